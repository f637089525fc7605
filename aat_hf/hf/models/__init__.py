"""GPT-2 and BERT with adaptive tiled attention: model types "aat-gpt2" and "aat-bert".

A saved model carries the files `configuration_*` and `modeling_*` of this folder as its Hub code, flattened: they
import each other relatively and anything else of this package by its full name.
"""

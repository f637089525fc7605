"""Attention probability that adaptive attention tiling loses, measured on random rows."""

import datasets
import evaluate

from aat_hf.metrics.measures import infidelity

_DESCRIPTION = "Attention probability that adaptive attention tiling loses, measured on random rows."
_INPUTS = """
Args:
    predictions (list of str): texts that the model reads.
    model, tokenizer: of a causal language model; the model is left as it was.
    tolerance (float, optional): in place of the model's own.
    max_tokens (int, optional): read so many tokens of each text.
"""


class AATInfidelity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """See `aat_hf.metrics.measures.infidelity`."""

    def _info(self):  # type: ignore[no-untyped-def]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options):  # type: ignore[no-untyped-def]
        return infidelity(predictions, **options)

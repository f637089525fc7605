"""BERT with adaptive tiled attention; ordinary BERT checkpoints load unchanged."""

from __future__ import annotations

from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel
from transformers.models.bert.modeling_bert import BertCrossAttention, BertOnlyMLMHead, BertSelfAttention

from .configuration_aat_bert import AATBertConfig
from .modeling_aat import AATModelMixin, add_curvatures


class AATBertModel(AATModelMixin, BertModel):
    """`BertModel` that attends with "aat" unless another implementation is asked for."""

    config: AATBertConfig
    config_class = AATBertConfig

    def __init__(self, config: AATBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        add_curvatures(self, config, (BertSelfAttention, BertCrossAttention))


class AATBertForMaskedLM(AATModelMixin, BertForMaskedLM):
    """`BertForMaskedLM` on `AATBertModel`."""

    config: AATBertConfig
    config_class = AATBertConfig

    def __init__(self, config: AATBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.bert = AATBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()  # type: ignore[no-untyped-call]


class AATBertForSequenceClassification(AATModelMixin, BertForSequenceClassification):
    """`BertForSequenceClassification` on `AATBertModel`."""

    config: AATBertConfig
    config_class = AATBertConfig

    def __init__(self, config: AATBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels or 2
        self.bert = AATBertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

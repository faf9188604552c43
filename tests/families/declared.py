"""What of the table of families does not agree for a reason that is not ours, and why; the page and
the test read it here.

A cell that is declared must be refused, or stop in PEFT or transformers; one that agrees, or
differs by a number, is a fault.
"""

_RENAMES = (
    "PEFT renames tensors as for a checkpoint of this model, and misses some of its own file too"
)
_TUPLES = (
    "PEFT's all-linear takes the router for a linear layer, and it gives several tensors: its"
    " forward stops"
)
_REPEATED = (
    "refused: transformers hands its experts every row once for each of them, without saying whose"
    " rows they are"
)
_REORDERED = (
    "refused: its layers sort or choose rows, and a module is not told which adapter acts on which"
)
_NO_CACHE = "as without a cache; with the cache it builds transformers' own loop "
_STOPS, _OTHERWISE = _NO_CACHE + "stops", _NO_CACHE + "answers otherwise"

DECLARED: dict[str, dict[str, str]] = {
    **{key: {"to PEFT": _RENAMES} for key in ("inkling2_loop_text", "inkling2_text", "laguna")},
    **{key: {"from PEFT": _TUPLES} for key in ("phimoe", "phimoe, window")},
    **{key: {"from PEFT": _TUPLES, "several": _REPEATED} for key in ("llama4", "llama4_text")},
    "blenderbot": {"answers": _STOPS},
    **{key: {"several": _REORDERED} for key in ("jetmoe", "zaya")},
    **{
        key: {
            "answers": (
                "as the model reads a whole text; transformers' own loop tells it other positions"
            )
        }
        for key in (
            "camembert",
            "data2vec-text",
            "roberta",
            "roberta-prelayernorm",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        )
    },
    "olmoe, window": {
        "answers": (
            "as the model reads a whole text; transformers' cache obeys a window that its masks"
            " ignore"
        )
    },
    "hrm_text": {
        "answers": _STOPS + " (in the small model, which has fewer layers than its cycles count)"
    },
    **{key: {"answers": _OTHERWISE} for key in ("moshi", "phi4_multimodal")},
    "doge": {
        "answers": _OTHERWISE,
        "run": (
            "transformers' logits of a text depend on the tokens after it: repeated tokens have"
            " equal scores in the first layer, and its top-k picks among them by the text's length"
        ),
    },
    "deepseek_v4": {
        "from PEFT": (
            "PEFT's all-linear takes a grouped projection for a linear layer: its forward stops"
        )
    },
    "reformer": dict.fromkeys(
        ("loss", "gradient", "several", "run", "goes on"),
        "refused: transformers' reversible layers have a backward pass in train mode alone",
    ),
}
"""Family -> column -> reason."""

NOT_OURS: dict[str, str] = {
    "MiniMax": (
        "where the first layer is a linear one, as in the real model, a text that is read in two"
        " parts, with the cache, has other logits than the text read at once"
    ),
    "Long RoPE (llama and others but Phi-3)": (
        "an answer that crosses the switch of frequencies has other logits with the cache than"
        " without: keys in the cache keep the frequencies of shorter texts"
    ),
    "xLSTM": (
        "`generate` stops where keys are narrower than values, as by default"
        " (`qk_dim_factor` 0.5); the columns compare the model's own forward"
    ),
    "Phi-MoE, Llama 4": "PEFT's `all-linear` stops at their routers, as their rows say",
}
"""Faults of transformers and PEFT beside the columns, for the page; test_families.py shows each."""

_NOT_BUILT = "transformers does not build its default config"
_NOT_CAUSAL = "refused: a token sees what stands behind it"
NOT_COMPARED: dict[str, str] = {
    "blt": "no small copy of it can be made here: no few layers hold every kind of its modules",
    "cpmant": _NOT_CAUSAL,
    "gemma3n": (
        "transformers builds its image tower with libraries that are not installed here (timm, PIL)"
    ),
    "gemma4_assistant": _NOT_BUILT,
    "gemma4_unified_assistant": (
        "no small copy of it can be made here: it reads the keys and values of another model"
    ),
    "musicgen": "several text models in one config",
    "musicgen_melody": "several text models in one config",
    "prophetnet": _NOT_CAUSAL,
    "qwen4_exp": _NOT_BUILT,
    "xlm": _NOT_CAUSAL,
    "xlnet": _NOT_CAUSAL,
}
"""Family -> why there is no row of it."""

"""The card of a trained model: how it knows positions, how it was trained, what it finds again."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import NAMES

from trl_ext.cards import (
    CardContent,
    Paper,
    Result,
    framework_versions,
    write_model_card,
)

ROPE = Paper(
    title="RoFormer: Enhanced Transformer with Rotary Position Embedding",
    id="2104.09864",
    citation="""@article{su2021roformer,
  title   = {{RoFormer: Enhanced Transformer with Rotary Position Embedding}},
  author  = {Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and
             Wen, Bo and Liu, Yunfeng},
  journal = {arXiv preprint arXiv:2104.09864},
  year    = {2021}
}""",
)
PI = Paper(
    title="Extending Context Window of Large Language Models via Positional Interpolation",
    id="2306.15595",
    citation="""@article{chen2023extending,
  title   = {{Extending Context Window of Large Language Models via Positional Interpolation}},
  author  = {Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong},
  journal = {arXiv preprint arXiv:2306.15595},
  year    = {2023}
}""",
)
YARN = Paper(
    title="YaRN: Efficient Context Window Extension of Large Language Models",
    id="2309.00071",
    citation="""@article{peng2023yarn,
  title   = {{YaRN: Efficient Context Window Extension of Large Language Models}},
  author  = {Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
  journal = {arXiv preprint arXiv:2309.00071},
  year    = {2023}
}""",
)
TAPA = Paper(
    title="Positional Encoding via Token-Aware Phase Attention",
    id="2509.12635",
    citation="""@article{wang2025positional,
  title   = {{Positional Encoding via Token-Aware Phase Attention}},
  author  = {Wang, Yu and Shen, Sheng and Munos, R{\\'e}mi and Zhan, Hongyuan and Tian, Yuandong},
  journal = {arXiv preprint arXiv:2509.12635},
  year    = {2025}
}""",
)
STICKBREAKING = Paper(
    title="Scaling Stick-Breaking Attention: An Efficient Implementation and In-depth Study",
    id="2410.17980",
    citation="""@article{tan2024scaling,
  title   = {{Scaling Stick-Breaking Attention: An Efficient Implementation and In-depth Study}},
  author  = {Tan, Shawn and Yang, Songlin and Courville, Aaron and Panda, Rameswar and
             Shen, Yikang},
  journal = {arXiv preprint arXiv:2410.17980},
  year    = {2024}
}""",
)
PAPERS = {"rope": ROPE, "pi": PI, "yarn": YARN, "tapa": TAPA, "stickbreaking": STICKBREAKING}
OURS = ("tapa", "stickbreaking")
USAGE = """\
{imported}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
inputs = tokenizer("def main(", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0]))"""


def write_card(folder: Path, results: Sequence[dict[str, Any]] = (), data: str = "") -> Path:
    """Writes the card of the model in `folder`, from its `stage.json` and the rows of `evaluate`.

    Args:
        folder: of a trained model.
        results: what it was measured to do, a row per length.
        data: name of the evaluated text.
    """
    stage = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    method, name = stage["method"], NAMES[stage["method"]]
    title = f"{method}-{stage['length']}"
    content = CardContent(
        title=title,
        method="long-context",
        method_name=name,
        summary=(
            f"A language model of {stage['parameters'] / 1e6:.1f} million parameters that knows "
            f"positions by {name}, trained on contexts of {stage['length']} tokens to see what it "
            "does beyond them."
        ),
        paper=PAPERS[method],
        license=stage["license"],
        datasets=(stage["dataset"],) if stage["dataset"] else (),
        dataset_note=data_note(stage),
        tags=(method,),
        hyperparameters=stage["hyperparameters"],
        training=training_facts(stage),
        versions=framework_versions(),
        results=card_results(results, data),
        intended_use="To compare attentions beyond the length they were trained on.",
        limitations=limitations(stage, results),
        usage=USAGE.format(
            imported="import trl_ext.models  # registers the model type\n" * (method in OURS),
            title=title,
        ),
        chat=False,
    )
    return write_model_card(content, folder)


def data_note(stage: dict[str, Any]) -> str:
    text = "" if stage["dataset"] else f"{stage['text']}, split {stage['split']}."
    if share := stage["retrieval_share"]:
        text += (
            f" {share:.0%} of the segments are documents that hide facts and ask for them: "
            "passkeys, and pairs of a key and a value."
        )
    return text.strip()


def training_facts(stage: dict[str, Any]) -> dict[str, str]:
    facts = {
        "Context": f"{stage['length']} tokens",
        "Trained on": f"{stage['tokens']:,} tokens, {stage['seconds']:.0f} s on {stage['device']}",
    }
    if stage["method"] in ("pi", "yarn"):
        facts["Scaling factor"] = f"{stage['factor']:g}"
    if stage["continued"]:
        facts["Started from"] = "a model that was pretrained on shorter contexts"
    return facts


def card_results(results: Sequence[dict[str, Any]], data: str) -> tuple[Result, ...]:
    return tuple(
        Result(
            dataset=data,
            metric=name,
            value=row[name],
            standard_error=None if math.isnan(row[f"{name}_se"]) else row[f"{name}_se"],
            n=row["windows"],
            split=f"held out, {row['length']} tokens",
        )
        for name in ("perplexity", "passkey", "recall")
        for row in results
    )


def limitations(stage: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "It has not been evaluated yet."
    found = {row["length"]: row for row in results}
    longest = max(found)
    text = (
        f"Of the passkeys in contexts of {longest} tokens it finds {found[longest]['passkey']:.0%}"
        f", of the pairs {found[longest]['recall']:.0%}. One model and one seed."
    )
    if stage["parameters"] < 1e8:
        text += " It is a toy: its text is not meant to be read."
    return text

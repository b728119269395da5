"""Loads saved folders and saves them on; test_hub.py runs it without `trl_ext` and triton.

`python load_from_folder.py <folders> <where to save>` prints what it found as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

TRUSTED = True


def refused(folder: Path) -> bool:
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return True
    return False


def largest(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).abs().max().item()


def causal_lm(folder: Path, onward: Path) -> dict:
    """What a language model of this folder does, beside what it did where it was saved."""
    said = torch.load(folder / "said.pt")
    facts = {"refused without trust": refused(folder)}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=TRUSTED)
    base = AutoModel.from_pretrained(folder, trust_remote_code=TRUSTED)
    generated = model.generate(said["ids"], max_new_tokens=8, do_sample=False)
    facts["logits"] = largest(model(said["ids"]).logits, said["logits"])
    facts["hidden"] = largest(base(said["ids"]).last_hidden_state, said["hidden"])
    facts["generated"] = torch.equal(generated, said["generated"])
    model.save_pretrained(onward, max_shard_size="20KB")
    torch.save(said, onward / "said.pt")
    return facts


def from_the_hub(name: str, folder: Path) -> float:
    """By its name, out of the cache of the Hub, which keeps and fetches file by file."""
    said = torch.load(folder / "said.pt")
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=TRUSTED)
    return largest(model(said["ids"]).logits, said["logits"])


def classifier(folder: Path, onward: Path) -> dict:
    said = torch.load(folder / "said.pt")
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=TRUSTED)
    model.save_pretrained(onward)
    torch.save(said, onward / "said.pt")
    return {"logits": largest(model(said["ids"]).logits, said["logits"])}


def adapted(folder: Path) -> list[str]:
    """What PEFT, imported only now, adapts by default."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=TRUSTED)
    config = peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"]
    return sorted(config.target_modules)


def main() -> None:
    folders, onward = map(Path, sys.argv[1:])
    facts = {}
    for folder in folders.iterdir():
        is_classifier = folder.name.endswith("classifier")
        load = classifier if is_classifier else causal_lm
        facts[folder.name] = load(folder, onward / folder.name)
    facts["from the Hub"] = from_the_hub("someone/tapa", folders / "tapa")
    facts["imported"] = sorted({"peft", "liger_kernel", "bitsandbytes"} & set(sys.modules))
    facts["adapted"] = adapted(folders / "tapa")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

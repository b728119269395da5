"""Run by `test_parallel.py` on two ranks: each variant with heads, layers or rows shared out."""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tests.conftest  # noqa: F401  the settings of every test
from tests.models.test_parallel import BATCH, EACH, NEW
from tests.processes import leave

WAYS = {
    "tensor": {"distributed_config": DistributedConfig(tp_plan="auto")},
    "sharded": {"distributed_config": DistributedConfig(fsdp_size=2)},
    "pipeline": {"distributed_config": DistributedConfig(pp_size=2)},
    "replicated": {},
}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def found(way: str, folder: Path) -> dict:
    """Logits, new tokens and gradients of one variant, gathered; and how much is kept here."""
    model = AutoModelForCausalLM.from_pretrained(folder, **WAYS[way])
    facts: dict = {"kept": sum(local(p).numel() for p in model.parameters())}
    if way == "replicated":
        rank = torch.distributed.get_rank()
        replica = DistributedDataParallel(model)  # which averages gradients as long as it lives
        out = replica(**{name: x[rank : rank + 1] for name, x in BATCH.items()})
    else:
        out = model(**BATCH)
        facts["logits"] = whole(out.logits).detach()
        prompt = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        for cache in (None, "static"):
            options = {"cache_implementation": cache, "do_sample": False, "max_new_tokens": NEW}
            facts[f"said {cache}"] = model.generate(**prompt, **options)
    if out.loss is not None:  # which the host's pipeline does not compute
        out.loss.backward()
        facts["gradients"] = torch.cat([whole(p.grad).flatten() for p in model.parameters()])
    return facts


def main(folder: Path) -> None:
    facts = {f"{way} {variant}": found(way, folder / variant) for way, variant in EACH}
    if torch.distributed.get_rank() == 0:
        torch.save(facts, folder / "facts.pt")
    leave()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))

"""A model larger than it may take: a 7B Llama-shaped folder of random bf16 weights, audited out of
its files.

The peer is one plain forward that streams the same folder through the same code: what anybody has
to pay to run the model at all. Every step runs in a process of its own, so that each has its own
peak of resident memory.

    python benchmarks/stream.py                  makes the folder (13.5 GB), about 25 minutes;
                                                 writes results/stream.json
    python benchmarks/stream.py --quick          a small shape, seconds; prints only
    python benchmarks/stream.py --folder DIR     where the folder is, or is to be made (default: in
                                                 the system's /tmp)
    python benchmarks/stream.py --only decide    one of the two audits; the other's figures stay
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "stream.json"
BATCH, SEQ = 1, 64
SHAPES = {
    "full": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "quick": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    },
}
SHARD = 8  # layers


# -- the folder ------------------------------------------------------------------------------------
def make(folder: Path, sizes: dict[str, int]) -> None:
    """Writes config, shards and index; a folder that is whole already is left as it is."""
    import torch
    from safetensors.torch import save_file

    index = folder / "model.safetensors.index.json"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        **sizes,
    }
    if index.is_file() and json.loads((folder / "config.json").read_text()) == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    d, inner, layers, vocab = (
        sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )

    def normal(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def layer(k: int) -> dict[str, Any]:
        made = {f"self_attn.{x}_proj": normal(d, d) for x in "qkvo"}
        made |= {
            "mlp.gate_proj": normal(inner, d),
            "mlp.up_proj": normal(inner, d),
            "mlp.down_proj": normal(d, inner),
        }
        made |= dict.fromkeys(
            ("input_layernorm", "post_attention_layernorm"), torch.ones(d, dtype=torch.bfloat16)
        )
        return {f"model.layers.{k}.{name}.weight": t.clone() for name, t in made.items()}

    count = -(-layers // SHARD) + 1
    places: dict[str, str] = {}
    for shard in range(count):
        if shard < count - 1:
            part = {
                n: t
                for k in range(shard * SHARD, min(layers, (shard + 1) * SHARD))
                for n, t in layer(k).items()
            }
        else:
            part = {
                "model.embed_tokens.weight": normal(vocab, d),
                "lm_head.weight": normal(vocab, d),
                "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
            }
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / "config.json").write_text(json.dumps(config))
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


# -- what is timed, each in a process of its own ---------------------------------------------------
def plain_forward(folder: str) -> dict[str, float]:
    """One forward of the model, every weight read from its file, raised to float32 where it is
    used, and dropped.
    """
    import torch

    from jacdiag.sources import build_probe, load
    from jacdiag.trace.execution.module_call import Call
    from jacdiag.trace.execution.replay import Replayer
    from jacdiag.trace.execution.skeleton import Skeleton
    from jacdiag.trace.graph.graph import Graph

    source = load(folder)
    assert source.model is not None
    probe = build_probe(source, batch=BATCH, seq=SEQ)
    skeleton = Skeleton(source.model, weights=source.weights)
    root = Call("", probe.args, probe.kwargs, {})
    replayer = Replayer(skeleton, Graph([], [], [], (), set()), torch.float32, root)
    begun = time.perf_counter()
    with torch.no_grad():
        replayer.tapped([], lambda spot, tensor: tensor)
    return {"seconds": time.perf_counter() - begun}


def audit(folder: str, decide: bool) -> dict[str, Any]:
    import jacdiag

    report = jacdiag.audit(
        folder, batch=BATCH, seq=SEQ, decide=decide, progress=Teller() if decide else None
    )
    assert report.cost is not None
    norms = [row.branch_norm for row in report.sublayers if row.branch_norm is not None]
    return {
        "seconds": report.cost.seconds,
        "products": report.cost.products,
        "phases": report.cost.phases,
        "sub_layers": len(report.sublayers),
        "measured": len(norms),
        "converged": sum(n.converged for n in norms),
        "verdict": report.verdict,
    }


class Teller:
    """Tells on stderr that it goes on."""

    def start(self, total: float, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def advance(self, units: float, text: str) -> None:
        print(".", end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        print(file=sys.stderr)


STEPS = {
    "plain": plain_forward,
    "decide": lambda folder: audit(folder, True),
    "everything": lambda folder: audit(folder, False),
}


def child(step: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", step, "--folder", folder]
    out = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    )
    out.check_returncode()
    return json.loads(out.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def killed(folder: str, after: float) -> list[str]:
    """What an audit that is killed on the way leaves beside its output."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        command = [
            sys.executable,
            "-m",
            "jacdiag_cli",
            "audit",
            folder,
            "--batch",
            str(BATCH),
            "--seq",
            str(SEQ),
            "--decide",
            "--json",
            str(out / "a.json"),
            "--plot",
            str(out / "a.png"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after)
        if process.poll() is not None:
            raise RuntimeError("it had ended before it could be killed")
        process.send_signal(signal.SIGKILL)
        process.wait()
        return sorted(f.name for f in out.iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; nothing is written")
    parser.add_argument("--folder", help="where the model's folder is, or is to be made")
    parser.add_argument("--only", choices=("decide", "everything"), help="one of the two audits")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        from jacdiag.pipeline.provenance import peak_memory_mb

        result = STEPS[args.step](args.folder)
        peak = peak_memory_mb() / 2**10
        print(json.dumps({**result, "peak_gib": round(peak, 2)}))
        return 0
    shape = "quick" if args.quick else "full"
    folder = args.folder or str(Path(tempfile.gettempdir()) / f"jacdiag-stream-{shape}")
    make(Path(folder), SHAPES[shape])
    size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    result: dict[str, Any] = {
        "shape": SHAPES[shape],
        "batch": BATCH,
        "seq": SEQ,
        "bytes": size,
        "cpus": os.cpu_count(),
    }
    if RESULTS.is_file() and not args.quick:
        result = {**json.loads(RESULTS.read_text()), **result}
    child("plain", folder)  # fills the page cache
    for step, most in (("decide", 25), ("everything", 100)):
        if args.only in (None, step):
            result[step] = beside_plain(step, folder, most)
    if args.only != "everything":
        left = killed(folder, 2.0 if args.quick else 4 * result["decide"]["plain_seconds"])
        result["left_by_a_kill"] = left
        goal("files left by a kill half-way", len(left), 0)
    if not args.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def beside_plain(step: str, folder: str, most: float) -> dict[str, Any]:
    """One audit, and the plain forwards before and after it: the machine may change its pace."""
    before = [child("plain", folder) for _ in range(2)]
    found = child(step, folder)
    print(step, found, file=sys.stderr)
    plain = [*before, *(child("plain", folder) for _ in range(2))]
    unit = statistics.median(p["seconds"] for p in plain)
    goals = [
        goal(f"{step}, in streamed plain forwards", found["seconds"] / unit, most),
        goal(f"peak resident memory with {step}, GiB", found["peak_gib"], 4),
    ]
    each = [round(p["seconds"], 2) for p in plain]
    return {**found, "plain_seconds": round(unit, 2), "plain_each": each, "goals": goals}


def goal(what: str, measured: float, most: float) -> dict[str, Any]:
    reached = measured <= most
    print(f"{'ok  ' if reached else 'MISS'}  {what:45s} {measured:8.3g}   <= {most:g}")
    return {
        "what": what,
        "measured": round(measured, 2),
        "relation": "<=",
        "goal": most,
        "reached": reached,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Audits a model from Python: one that is in memory already, on tokens of one's own.

python examples/audit_in_python.py
"""

from __future__ import annotations

import torch

import jacdiag
from jacdiag.sources.gpt import build


def main() -> None:
    torch.manual_seed(0)
    model = build("vanilla", n_layer=4, n_head=4, n_embd=128, vocab_size=512, block_size=64)
    tokens = torch.randint(512, (2, 64))

    # What is in the model? Every sub-layer is found from one recorded forward, its branch is a
    # function.
    for site in jacdiag.sites(model, tokens):
        exact = torch.equal(site.branch(site.shortcut), site.value)
        print(f"{site.name:22} {site.kind:10} {site.placement:5} replayed exactly: {exact}")

    # The whole audit: table, picture, and everything as data.
    report = jacdiag.audit(model, tokens)
    report.table()
    report.plot("gain.png")
    worst = max(report.sublayers, key=lambda row: row.branch_norm.estimate)
    print(
        f"\nverdict {report.verdict}; worst branch norm at {worst.name}: "
        f"between {worst.branch_norm.lower:.3f} and {worst.branch_norm.upper:.3f}"
    )

    # One norm of one function, with its error bar.
    weight = torch.randn(64, 64) / 8
    norm = jacdiag.spectral_norm(lambda x: torch.tanh(x @ weight), torch.randn(3, 64), tol=0.01)
    print(
        "per batch element:",
        [f"{low:.3f} to {high:.3f}" for low, high in zip(norm.lower, norm.upper, strict=True)],
    )


if __name__ == "__main__":
    main()

"""Scores and reports of generated images.

    from eval import fid
    print(fid("samples", "data/celeba"))

`fid` is the module `eval.fid`: called, it does what `eval.fid.fid_of` says.

Each layer imports only those before it: metrics, features, distances and score, checks, measures, page, commands.
"""

from core.cli.errors import explain_early_interrupts

explain_early_interrupts()

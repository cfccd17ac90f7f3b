"""Which structures of a pool deserve an expensive label.

    pool, labelled ──read──▶ structures ──same geometry──▶ candidates ──release──▶ latent features, σ, differences
                                                                                         │
    selected.extxyz, selection.json, selection.png ◀──reasons── greedy picks ◀──criterion──┘

``pool`` reads, ``latent`` asks the release, ``criteria`` and ``greedy`` choose and know nothing of structures, ``run``
puts them together.
"""

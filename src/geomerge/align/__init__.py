"""Alignment of one model's hidden basis with another's before they are merged.

`procrustes` finds the rotation, `residual` says which tensors of a decoder read from and write into the residual stream,
`sources` rotates tensors while they are read. The engine puts these together (`geomerge.engine.alignment`).

    Q = argmin ‖E₂·Q − E₁‖  over orthogonal Q     from the embeddings of shared tokens
    reader W ← W·diag(g)·Q     writer W ← Qᵀ·W     bias b ← b·Q     gain g ← 1
"""

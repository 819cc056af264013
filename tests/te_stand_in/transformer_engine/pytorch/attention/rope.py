"""transformer_engine/pytorch/attention/rope.py: a kernel, which needs a GPU."""


def apply_rotary_pos_emb() -> None: ...

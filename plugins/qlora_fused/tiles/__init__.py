"""Products, gated MLPs and attention by the instructions for tiles of bfloat16 (AMX) of a CPU; `jit.has_tiles` says where.

From below: `instructions` and `lanes`, which loops are written with; `panels` and `gates`, what is multiplied and what is done
meanwhile; `loop` and `chains`, products; `lora` and `attention`, what models are computed with. Light: imports nothing.
"""

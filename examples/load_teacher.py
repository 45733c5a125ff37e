"""Load an SAE that any library of the field has saved: python examples/load_teacher.py PATH_OR_HUB_ID"""

import sys

from rsae_triton import load_teacher

teacher = load_teacher(sys.argv[1])  # such as google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71
print(f"{type(teacher).__name__} with d_in={teacher.d_in}, d_sae={teacher.d_sae}")
for name, value in teacher.metadata.items():  # model_name, hook_name, what was folded, ...
    print(f"  {name}: {value}")

"""Load a Rational SAE, save it elsewhere and put it on the hub: python examples/save.py RSAE OUT [OWNER/NAME]"""

import sys

from rsae_triton import FusedRationalSAE

rsae = FusedRationalSAE.from_pretrained(sys.argv[1])  # a folder or a hub id
rsae.metadata["author"] = "me"
folder = rsae.save_pretrained(sys.argv[2])
print(*sorted(file.name for file in folder.iterdir()))  # README.md cfg.json sae_weights.safetensors
if len(sys.argv) > 3:
    print(rsae.push_to_hub(sys.argv[3], private=True))

"""Upgrade a teacher and save it: python examples/upgrade.py TEACHER MODEL TEXT OUT"""

import sys

import rsae_triton as rt
from rsae_triton.activations import extract_splits, load_corpus

source, model, text, out = sys.argv[1:]  # such as out/demo/teacher smollm2 demo out/mine
teacher = rt.load_teacher(source)
host = rt.load_host(model, hook_name=teacher.metadata.get("hook_name"))
train, _, test = extract_splits(host, load_corpus(text), n_train=20_000, n_validation=2_000, n_test=2_000)
rsae = rt.upgrade(teacher, train)  # stage 1
rt.train(rsae, train, steps=100)  # stage 2, at the teacher's l0
scores = rt.evaluate(rsae, host, test, n_sequences=8)
rsae.save_pretrained(out, metrics={"rsae": scores})
print(f"{out}: l0 {scores['l0']:.1f}, fvu {scores['fvu']:.4f}, delta_ce {scores['delta_ce']:.4f}")

"""Stage 1: a teacher becomes a Rational SAE with the teacher's weights, its gate fitted and calibrated."""

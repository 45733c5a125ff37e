"""Stage 1: turns a teacher into a Rational SAE that keeps the teacher's weights, with a fitted and calibrated gate."""

"""Rational SAEs in other people's tools. Each module needs only the library it is named after."""

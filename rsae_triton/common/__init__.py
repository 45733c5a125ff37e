"""Errors, checks of arguments, files, the hub, progress: what every room uses. Imports no other room."""

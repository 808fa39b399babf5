"""Builds the wheel for arm64 macOS on any machine; see cross_compile.py."""

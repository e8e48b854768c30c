"""Utilities around quantization: calibration data."""

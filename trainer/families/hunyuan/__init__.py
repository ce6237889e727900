"""HunyuanVideo, text to video."""

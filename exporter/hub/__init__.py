"""The Hugging Face Hub as downloads and uploads share it: its client, its listings, its errors in plain words."""

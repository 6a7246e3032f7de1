"""Model folders in Hugging Face format, in and out, and files from elsewhere checked."""

"""Networks that images are measured with: Inception, CLIP, SSCD, LPIPS."""

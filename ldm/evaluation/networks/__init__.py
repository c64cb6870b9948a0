"""Networks that give features of images: Inception, CLIP, SSCD; and LPIPS, of pairs of images."""

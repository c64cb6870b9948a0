"""Condition images for ControlNets and T2I-Adapters: made of an image by filters, or by networks of transformers."""

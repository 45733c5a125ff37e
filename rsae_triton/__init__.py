"""rsae_triton: upgrade a pretrained sparse autoencoder into a Rational SAE, with fused Triton kernels."""

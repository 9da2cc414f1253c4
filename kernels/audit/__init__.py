"""What the kernels compile to, move and cost: what `fastlm kernels` shows and the tests hold."""

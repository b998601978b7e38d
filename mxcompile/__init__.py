"""mxcompile: ahead-of-time compiler for hybrid lightning-attention mixture-of-experts models."""

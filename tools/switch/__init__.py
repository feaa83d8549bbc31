"""Switch Transformers at the ExpertFlow paper's dimensions, trained for some minutes so that their routing is learned."""

"""What compiled GPU programs cost, counted without a GPU and not measured."""

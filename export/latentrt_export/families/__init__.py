"""Model families: how a checkpoint of each becomes the components of a bundle."""

"""Records of files and of the Hub, as samples for a model."""

"""Model cards of adapters and of compressed models: written, completed for the Hub, finished with results."""

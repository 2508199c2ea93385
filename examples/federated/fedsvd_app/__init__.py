"""FedSVD as a Flower app: `task` says what is learnt, `client_app` and `server_app` are what Flower runs."""

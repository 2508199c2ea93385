"""The app in Flower's simulation: clients are actors of Ray (`pip install "peftx[federated-sim]"`).

    python simulation.py [--rounds 3] [--clients 3] [--method fedsvd] [--epsilon 6] [--logs FOLDER]

Ray listens on all addresses of the machine, whatever it is told: not on a shared one. Everything started here is ended.
"""

from deployment import main

if __name__ == "__main__":
    main(description=__doc__, simulation=True)

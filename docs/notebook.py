# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First faces
#
# Draws faces, trains a small GAN on them, looks at what it draws, and scores it. About two minutes on two CPU cores;
# nothing is downloaded but the package itself. For faces that one recognises, take `experiment=demo` in place of
# `experiment=smoke`, and on a GPU your own data with `experiment=course`.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("gen") is None:  # on Colab, for example
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "facet-faces[pretrained]"], check=True)


def facet(command):
    """Run a command of Facet as in a terminal."""
    subprocess.run([sys.executable, "-m", "scripts.facet", *command.split()], check=True)


# %% [markdown]
# ## A data set and a generator

# %%
facet("prepare drawn --count 500 --out data/drawn")
facet("train data=data/drawn name=first experiment=smoke")

# %% [markdown]
# ## What it draws
# The same seeds give the same pictures anywhere.

# %%
from PIL import Image

from core.data.images import make_grid
from gen import generate, load

generator = load("runs/first")
Image.fromarray(make_grid(generate(generator, 32), columns=8))

# %% [markdown]
# Faces that turn into one another:

# %%
import IPython.display

facet("sample runs/first --walk faces.gif --seconds 4 --fps 10")
IPython.display.Image("faces.gif")

# %% [markdown]
# ## A score
# `features=random` needs no download. For the real FID leave it out, or `from eval import fid` and
# `fid(generate(generator, 1000), "data/drawn")`.

# %%
facet("score source=runs/first data=data/drawn features=random n=200")

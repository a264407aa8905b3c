"""Parts of the first run on a GPU: kernels.py of perl_kernels, trainer.py of the training step, folder.py a model of true size."""

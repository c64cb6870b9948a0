"""A model folder: the new autoencoder and text encoders, and the first edition's U-Net but for its first and last layer."""
import sys, torch
from dataclasses import replace
from ldm.latent_diffusion import LatentDiffusion
from ldm.families import FAMILIES
import ldm
from pathlib import Path
out, ae, text = sys.argv[1:4]
first = LatentDiffusion.from_pretrained(Path(ldm.__file__).parent/"builtin"/"emoji")
fam = first.family
new_ae = LatentDiffusion.from_pretrained(ae)
new_text = LatentDiffusion.from_pretrained(text)
family = replace(fam, unet=replace(fam.unet,in_channels=16,out_channels=16), autoencoder=new_ae.family.autoencoder, name="custom")
torch.manual_seed(0)
m = LatentDiffusion.from_family(family)
sd = first.unet.state_dict(); mine=m.unet.state_dict()
skip=[k for k in mine if mine[k].shape!=sd[k].shape]
print("fresh:",skip)
m.unet.load_state_dict({k:(mine[k] if k in skip else sd[k].float()) for k in mine})
m.autoencoder.load_state_dict({k:v.float() for k,v in new_ae.autoencoder.state_dict().items()})
m.networks["text_encoders"].load_state_dict({k:v.float() for k,v in new_text.text_encoders.state_dict().items()})
print(new_ae.family.autoencoder, fam.schedule, m.family.autoencoder.scaling_factor)
m.save_pretrained(out)

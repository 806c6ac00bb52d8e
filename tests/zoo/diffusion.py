"""Models that make images from noise."""

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2

DOUBLE, SINGLE = 2, 1
FLUX_ATTENTION = 4 * DOUBLE + 2 * SINGLE
FLUX = backbone(
    "FluxBackbone",
    dict(
        input_channels=4,
        hidden_size=16,
        mlp_ratio=1.5,
        num_heads=2,
        depth=DOUBLE,
        depth_single_blocks=SINGLE,
        axes_dim=[2, 2, 4],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(6, 4),
        text_shape=(5, 10),
        image_ids_shape=(6, 3),
        text_ids_shape=(5, 3),
        y_shape=(12,),
    ),
    # Both streams have queries, keys and values together, and an output. With
    # one stream, the feed-forward part goes through the same two layers.
    attention=FLUX_ATTENTION,
    mlp=4 * DOUBLE,
    # A modulation for each stream; image and text, and two layers each for
    # time, guidance and the pooled text; the output and its modulation.
    linear=FLUX_ATTENTION + (4 + 2) * DOUBLE + SINGLE + 2 + 2 * 3 + 2,
)


def make_stable_diffusion():
    import keras_hub
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    def clip(name, size):
        return CLIPTextEncoder(
            vocabulary_size=50,
            embedding_dim=size,
            hidden_dim=size,
            num_layers=LAYERS,
            num_heads=2,
            intermediate_dim=10,
            intermediate_output_index=-2,
            max_sequence_length=32,
            name=name,
        )

    vae = VAEBackbone(
        encoder_num_filters=[32, 32, 32, 64],
        encoder_num_blocks=[1, 1, 1, 1],
        decoder_num_filters=[64, 32, 32, 32],
        decoder_num_blocks=[1, 1, 1, 1],
        # Sampling gives something else at every call.
        sampler_method="mode",
        sample_channels=8,
        name="vae",
    )
    model = keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=LAYERS,
        mmdit_num_heads=2,
        mmdit_position_size=6,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=vae,
        clip_l=clip("clip_l", 8),
        clip_g=clip("clip_g", 12),
        latent_channels=4,
        image_shape=(32, 32, 3),
    )
    # As `generate` does. The schedule noted while the model was put together
    # has no values.
    model.configure_scheduler(4)
    return model


# Two of CLIP. keras-hub cannot make its T5 on torch, and does without it.
TEXT_ATTENTION = 2 * 4 * LAYERS
TEXT_MLP = 2 * 2 * LAYERS
# Queries, keys and values together, and an output, for image and for text; a
# second attention of images in the first block. The last one makes no text.
SD3_ATTENTION = TEXT_ATTENTION + 4 * LAYERS + 2 - 1
SD3_MLP = TEXT_MLP + 4 * LAYERS - 2
# On the way in and out of the latents: a convolution at both ends, two in each
# of four blocks and in the two around the attention, whose projections are
# convolutions as well, three that change the size, and one more where the
# number of channels changes.
VAE_CONVOLUTIONS = 2 * (2 + 2 * (4 + 2) + 4 + 3 + 1)
STABLE_DIFFUSION = Case(
    "StableDiffusion3Backbone",
    make_stable_diffusion,
    attention=SD3_ATTENTION,
    mlp=SD3_MLP,
    # Modulations of image and text; the text, and two layers each for the
    # pooled text and the time; the output and its modulation; the projections
    # of both CLIPs.
    linear=SD3_ATTENTION + SD3_MLP + 2 * LAYERS + 1 + 2 * 2 + 2 + 2,
    embeddings=2,
    convolutions=VAE_CONVOLUTIONS + 1,
    # The normalization's 32 groups make this VAE larger than all the rest.
    default=("attention", "mlp", "convolutions"),
)
NO_FIT = {"train": "keras-hub's `fit` refuses this task"}

CASES: tuple[Case, ...] = (
    FLUX,
    task("FluxTextToImage", FLUX, dict(unable=NO_FIT)),
    STABLE_DIFFUSION,
    task("StableDiffusion3ImageToImage", STABLE_DIFFUSION, dict(unable=NO_FIT)),
    task("StableDiffusion3Inpaint", STABLE_DIFFUSION, dict(unable=NO_FIT)),
    task("StableDiffusion3TextToImage", STABLE_DIFFUSION, dict(unable=NO_FIT)),
)

"""Which models `benchmarks/prunability.py` prunes, and how each is built.

torchvision: every model. timm: of every module the variant with the fewest parameters times
pixels. transformers and diffusers: small configurations, nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]
"""A model and its example inputs: a tensor, a tuple or a mapping."""


@dataclass(frozen=True)
class Case:
    """One model of the benchmark."""

    family: str
    name: str
    build: Callable[[], Built]


def cases() -> Iterator[Case]:
    """All models, family by family."""
    yield from torchvision_cases()
    yield from timm_cases()
    yield from transformers_cases()
    yield from diffusers_cases()


# --- torchvision ------------------------------------------------------------------------------


def torchvision_cases() -> Iterator[Case]:
    """Every model that torchvision lists; not the quantized ones, whose weights are packed."""
    from torchvision import models

    kinds = {
        models: "classification",
        models.segmentation: "segmentation",
        models.detection: "detection",
        models.video: "video",
        models.optical_flow: "optical flow",
    }
    for module, kind in kinds.items():
        for name in models.list_models(module=module):
            yield Case("torchvision", name, lambda n=name, k=kind: _torchvision(n, k))


def _torchvision(name: str, kind: str) -> Built:
    from torchvision import models

    if kind == "detection":
        model = models.get_model(name, weights=None, weights_backbone=None)
        size = 300 if name.startswith("ssd300") else 320 if name.startswith("ssdlite") else 256
        transform = model.transform
        if not name.startswith("ssd"):
            transform.min_size, transform.max_size = (size,), size
        return model, ([torch.rand(3, size, size)],)
    if kind == "segmentation":
        return (
            models.get_model(name, weights=None, weights_backbone=None, aux_loss=True)
            if "lraspp" not in name
            else models.get_model(name, weights=None, weights_backbone=None)
        ), torch.randn(1, 3, 128, 128)
    if kind == "video":
        frames, size = (16, 224) if name.startswith("mvit") else (8, 112)
        if name == "s3d":
            frames, size = 16, 224
        return models.get_model(name, weights=None), torch.randn(1, 3, frames, size, size)
    if kind == "optical flow":
        model = models.get_model(name, weights=None)
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2)
    sizes = {"inception_v3": 299}
    extra = (
        {"init_weights": False, "aux_logits": False}
        if name in ("googlenet", "inception_v3")
        else {}
    )
    size = sizes.get(name, 224)
    return models.get_model(name, weights=None, **extra), torch.randn(1, 3, size, size)


# --- timm -------------------------------------------------------------------------------------

TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""Module -> its variant with the fewest parameters times pixels."""
LARGEST = 336
"""Pixels of a side for models that take any size."""


def timm_cases() -> Iterator[Case]:
    """The smallest variant of every timm module."""
    for module, name in TIMM.items():
        yield Case("timm", f"{module}/{name}", lambda n=name: _timm(n))


def _timm(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    config = getattr(model, "default_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    if size[-1] > LARGEST and not config.get("fixed_input_size"):
        size = [LARGEST, LARGEST]
    return model, torch.randn(1, channels, *size)


# --- transformers -----------------------------------------------------------------------------

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
"""Two query heads share each key head."""
ENCODER_DECODER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GPT = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "mask_time_prob": 0.0,
}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

TRANSFORMERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    # text decoders
    ("GPT2LMHeadModel", "GPT2Config", "text", GPT),
    ("GPTNeoForCausalLM", "GPTNeoConfig", "text", {
        "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
        "window_size": 8, "bos_token_id": 1, "eos_token_id": 2}),
    ("GPTJForCausalLM", "GPTJConfig", "text", {**GPT, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", "text", TEXT),
    ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", "text", GPT),
    ("CodeGenForCausalLM", "CodeGenConfig", "text", {**GPT, "rotary_dim": 4}),
    ("LlamaForCausalLM", "LlamaConfig", "text", GROUPED),
    ("MistralForCausalLM", "MistralConfig", "text", GROUPED),
    ("Qwen2ForCausalLM", "Qwen2Config", "text", GROUPED),
    ("Qwen3ForCausalLM", "Qwen3Config", "text", {**GROUPED, "head_dim": 8}),
    ("GemmaForCausalLM", "GemmaConfig", "text", {**GROUPED, "head_dim": 8}),
    ("Gemma2ForCausalLM", "Gemma2Config", "text", {**GROUPED, "head_dim": 8}),
    ("PhiForCausalLM", "PhiConfig", "text", GROUPED),
    ("Phi3ForCausalLM", "Phi3Config", "text", GROUPED),
    ("StableLmForCausalLM", "StableLmConfig", "text", GROUPED),
    ("Starcoder2ForCausalLM", "Starcoder2Config", "text", GROUPED),
    ("Olmo2ForCausalLM", "Olmo2Config", "text", GROUPED),
    ("CohereForCausalLM", "CohereConfig", "text", GROUPED),
    ("OPTForCausalLM", "OPTConfig", "text", {
        "vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    ("BloomForCausalLM", "BloomConfig", "text", {
        "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ("FalconForCausalLM", "FalconConfig", "text", {**TEXT, "alibi": False}),
    ("MptForCausalLM", "MptConfig", "text", {
        "vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    ("BioGptForCausalLM", "BioGptConfig", "text", TEXT),
    ("MixtralForCausalLM", "MixtralConfig", "text", EXPERTS),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", "text", {
        **GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32}),
    ("MambaForCausalLM", "MambaConfig", "text", {
        "vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    # text encoders
    ("BertForSequenceClassification", "BertConfig", "text", TEXT),
    ("RobertaForMaskedLM", "RobertaConfig", "text", TEXT),
    ("DistilBertForSequenceClassification", "DistilBertConfig", "text", {
        "vocab_size": 96, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    ("AlbertForMaskedLM", "AlbertConfig", "text", {**TEXT, "embedding_size": 16}),
    ("ElectraForPreTraining", "ElectraConfig", "text", {**TEXT, "embedding_size": 16}),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", "text", {
        **TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("MPNetForMaskedLM", "MPNetConfig", "text", TEXT),
    ("ModernBertForMaskedLM", "ModernBertConfig", "text", {
        **TEXT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
        "reference_compile": False}),
    ("ConvBertForMaskedLM", "ConvBertConfig", "text", {
        **TEXT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
    ("SqueezeBertForMaskedLM", "SqueezeBertConfig", "text", {
        **TEXT, "embedding_size": 32}),
    ("MobileBertForMaskedLM", "MobileBertConfig", "text", {
        **TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    ("FNetForMaskedLM", "FNetConfig", "text", {
        k: v for k, v in TEXT.items() if k != "num_attention_heads"}),
    ("XLMRobertaForMaskedLM", "XLMRobertaConfig", "text", TEXT),
    ("LayoutLMForTokenClassification", "LayoutLMConfig", "text", TEXT),
    # encoder-decoder
    ("T5ForConditionalGeneration", "T5Config", "seq2seq", {
        "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0}),
    ("MT5ForConditionalGeneration", "MT5Config", "seq2seq", {
        "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0}),
    ("BartForConditionalGeneration", "BartConfig", "seq2seq", ENCODER_DECODER),
    ("MBartForConditionalGeneration", "MBartConfig", "seq2seq", ENCODER_DECODER),
    ("MarianMTModel", "MarianConfig", "seq2seq", ENCODER_DECODER),
    ("PegasusForConditionalGeneration", "PegasusConfig", "seq2seq", ENCODER_DECODER),
    ("M2M100ForConditionalGeneration", "M2M100Config", "seq2seq", ENCODER_DECODER),
    ("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", "seq2seq",
     ENCODER_DECODER),
    # vision
    ("ViTForImageClassification", "ViTConfig", "image", VISION),
    ("DeiTForImageClassification", "DeiTConfig", "image", VISION),
    ("BeitForImageClassification", "BeitConfig", "image", VISION),
    ("Dinov2ForImageClassification", "Dinov2Config", "image", VISION),
    ("ViTMAEModel", "ViTMAEConfig", "masked image", {**VISION, "mask_ratio": 0.0}),
    ("SwinForImageClassification", "SwinConfig", "image", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
        "num_heads": [2, 4], "window_size": 4}),
    ("Swinv2ForImageClassification", "Swinv2Config", "image", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
        "num_heads": [2, 4], "window_size": 4}),
    ("ConvNextForImageClassification", "ConvNextConfig", "image", {
        "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}),
    ("ConvNextV2ForImageClassification", "ConvNextV2Config", "image", {
        "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}),
    ("ResNetForImageClassification", "ResNetConfig", "image", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
    ("RegNetForImageClassification", "RegNetConfig", "image", {
        "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
        "groups_width": 8}),
    ("SegformerForSemanticSegmentation", "SegformerConfig", "image64", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 32}),
    ("MobileViTForImageClassification", "MobileViTConfig", "image64", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32,
        40, 64]}),
    ("PoolFormerForImageClassification", "PoolFormerConfig", "image64", {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    ("PvtForImageClassification", "PvtConfig", "image64", {
        "image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4]}),
    ("LevitForImageClassification", "LevitConfig", "image64", {
        "image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6],
        "depths": [1, 1, 1], "key_dim": [8, 8, 8]}),
    ("YolosForObjectDetection", "YolosConfig", "image", {
        **VISION, "image_size": [32, 32], "num_detection_tokens": 4}),
    ("DPTForDepthEstimation", "DPTConfig", "image", {
        **VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}),
    ("VideoMAEForVideoClassification", "VideoMAEConfig", "video", {
        **VISION, "num_frames": 4}),
    # audio
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", "audio", AUDIO),
    ("HubertForCTC", "HubertConfig", "audio", AUDIO),
    ("WavLMForCTC", "WavLMConfig", "audio", AUDIO),
    ("WhisperForConditionalGeneration", "WhisperConfig", "whisper", {
        **ENCODER_DECODER, "num_mel_bins": 16, "max_source_positions": 16,
        "max_target_positions": 16}),
    ("ASTForAudioClassification", "ASTConfig", "spectrogram", {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_length": 32, "num_mel_bins": 16, "patch_size": 8,
        "time_stride": 8, "frequency_stride": 8}),
    # several modalities
    ("CLIPModel", "CLIPConfig", "image and text", {
        "text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION,
        "projection_dim": 16}),
    ("SiglipModel", "SiglipConfig", "image and text", {
        "text_config": TEXT, "vision_config": VISION}),
    ("ViltForQuestionAnswering", "ViltConfig", "image and text", {
        **VISION, "vocab_size": 96, "max_position_embeddings": 64, "num_labels": 7}),
    ("BlipForImageTextRetrieval", "BlipConfig", "image and text", {
        "text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2,
                        "encoder_hidden_size": 32},
        "vision_config": VISION, "projection_dim": 16, "image_text_hidden_size": 16}),
    ("LlavaForConditionalGeneration", "LlavaConfig", "image in text", {
        "text_config": {"model_type": "llama", **GROUPED},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 95, "image_seq_length": 16}),
)  # fmt: skip
"""Model class, configuration class, kind of input, configuration."""


def transformers_cases() -> Iterator[Case]:
    """Small configurations of the architectures above."""
    for model, config, kind, options in TRANSFORMERS:
        yield Case(
            "transformers",
            model,
            lambda m=model, c=config, k=kind, o=options: _transformer(m, c, k, o),
        )


def _transformer(model: str, config: str, kind: str, options: dict[str, Any]) -> Built:
    import transformers

    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    tokens = torch.randint(3, 90, (2, 16))
    image = torch.randn(2, 3, 32, 32)
    inputs: dict[str, dict[str, Any]] = {
        "text": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        "seq2seq": {"input_ids": tokens, "decoder_input_ids": tokens[:, :8]},
        "image": {"pixel_values": image},
        "masked image": {"pixel_values": image, "noise": torch.rand(2, 16)},
        "image64": {"pixel_values": torch.randn(2, 3, 64, 64)},
        "video": {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        "audio": {"input_values": torch.randn(2, 1600)},
        "whisper": {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens[:, :8]},
        "spectrogram": {"input_values": torch.randn(2, 32, 16)},
        "image and text": {"input_ids": tokens, "pixel_values": image},
        "image in text": {
            "input_ids": torch.cat([torch.full((2, 16), 95), tokens], 1),
            "attention_mask": torch.ones(2, 32, dtype=torch.long),
            "pixel_values": image,
        },
    }
    return built, inputs[kind]


# --- diffusers --------------------------------------------------------------------------------

_LATENT = {"sample": (2, 4, 16, 16), "timestep": 5, "encoder_hidden_states": (2, 8, 32)}
_CONDITION = {
    "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
    "cross_attention_dim": 32, "attention_head_dim": 8, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip
DIFFUSERS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("UNet2DModel", {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
     {"sample": (2, 3, 16, 16), "timestep": 5}),
    ("UNet2DConditionModel", {
        **_CONDITION, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, _LATENT),
    ("ControlNetModel", {
        **{k: v for k, v in _CONDITION.items() if k != "sample_size"},
        "conditioning_embedding_out_channels": (8, 16)},
     {**_LATENT, "controlnet_cond": (2, 3, 32, 32)}),
    ("UNet1DModel", {
        "block_out_channels": (16, 32), "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
        "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"), "extra_in_channels": 32,
        "sample_size": 64},
     {"sample": (2, 2, 64), "timestep": 5}),
    ("AutoencoderKL", {
        "block_out_channels": (16, 32), "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2},
     {"sample": (2, 3, 16, 16)}),
    ("AutoencoderTiny", {
        "encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
     {"sample": (2, 3, 16, 16)}),
    ("VQModel", {
        "block_out_channels": (16, 32), "norm_num_groups": 4, "num_vq_embeddings": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2},
     {"sample": (2, 3, 16, 16)}),
    ("DiTTransformer2DModel", {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
        "sample_size": 16, "patch_size": 2, "norm_num_groups": 4, "num_embeds_ada_norm": 10},
     {"hidden_states": (2, 4, 16, 16), "timestep": [5, 6], "class_labels": [1, 2]}),
    ("PixArtTransformer2DModel", {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 16, "cross_attention_dim": 32, "caption_channels": 24,
        "norm_num_groups": 4, "use_additional_conditions": False},
     {"hidden_states": (2, 4, 16, 16), "timestep": [5, 6], "encoder_hidden_states": (2, 8, 24),
      "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    ("SD3Transformer2DModel", {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 16, "out_channels": 4,
        "pos_embed_max_size": 16},
     {"hidden_states": (2, 4, 16, 16), "timestep": [5, 6], "encoder_hidden_states": (2, 8, 24),
      "pooled_projections": (2, 16)}),
    ("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": False},
     {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 8, 32),
      "pooled_projections": (2, 32), "timestep": [0.5, 0.6], "img_ids": (16, 3),
      "txt_ids": (8, 3)}),
    ("SanaTransformer2DModel", {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8,
        "num_layers": 2, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8,
        "cross_attention_dim": 32, "caption_channels": 24, "sample_size": 16, "patch_size": 1},
     {"hidden_states": (2, 4, 16, 16), "timestep": [5, 6], "encoder_hidden_states": (2, 8, 24)}),
    ("PriorTransformer", {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2,
        "embedding_dim": 24, "num_embeddings": 7, "additional_embeddings": 4},
     {"hidden_states": (2, 24), "timestep": 5, "proj_embedding": (2, 24),
      "encoder_hidden_states": (2, 7, 24)}),
    ("AuraFlowTransformer2DModel", {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
        "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
        "caption_projection_dim": 32, "joint_attention_dim": 24, "out_channels": 4,
        "pos_embed_max_size": 256},
     {"hidden_states": (2, 4, 16, 16), "timestep": [0.5, 0.6],
      "encoder_hidden_states": (2, 8, 24)}),
    ("UVit2DModel", {
        "hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 8,
        "micro_cond_embed_dim": 40, "encoder_hidden_size": 32, "vocab_size": 40,
        "codebook_size": 32, "in_channels": 32, "block_out_channels": 32,
        "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "block_num_heads": 4, "num_res_blocks": 1, "sample_size": 8},
     {"input_ids": torch.zeros(2, 8, 8, dtype=torch.long), "encoder_hidden_states": (2, 8, 32),
      "pooled_text_emb": (2, 16), "micro_conds": (2, 5)}),
)  # fmt: skip
"""Class, configuration, inputs: a tuple is the shape of noise, the rest is given as it is."""


def diffusers_cases() -> Iterator[Case]:
    """Small configurations of the architectures above."""
    for name, config, inputs in DIFFUSERS:
        yield Case("diffusers", name, lambda n=name, c=config, i=inputs: _diffuser(n, c, i))


def _diffuser(name: str, config: dict[str, Any], inputs: dict[str, Any]) -> Built:
    import diffusers

    def value(given: Any) -> Any:
        if isinstance(given, tuple):
            return torch.randn(given)
        return torch.tensor(given) if isinstance(given, list) else given

    model = getattr(diffusers, name)(**config)
    return model, {key: value(given) for key, given in inputs.items()}

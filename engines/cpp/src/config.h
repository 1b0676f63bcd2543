// Architecture and recipe of a model, as the manifest stores them (higen/config.py).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace higen::core {

struct UNetConfig {
    std::int64_t in_channels = 4;
    std::int64_t out_channels = 4;
    std::int64_t base_channels = 320;
    std::vector<std::int64_t> channel_multipliers = {1, 2, 4, 4};
    std::int64_t blocks_per_level = 2;
    std::vector<bool> attention_levels = {true, true, true, false};
    std::int64_t head_dim = 64;
    std::int64_t first_temporal_heads = 8;
    std::int64_t text_dim = 1024;
    std::int64_t context_dim = 1024;
    std::int64_t context_tokens = 16;
    std::int64_t context_depth = 2;
    std::int64_t context_heads = 8;
    std::int64_t appearance_columns = 32;
    double dropout = 0.1;
    bool prior_preconditioning = false;
    bool pooled_context = false;

    [[nodiscard]] std::int64_t embedding_dim() const { return 4 * base_channels; }
    // Latent height and width must be multiples of this (one halving between two levels).
    [[nodiscard]] std::int64_t size_multiple() const { return std::int64_t{1} << (channel_multipliers.size() - 1); }
};

// Noise schedule: SD's scaled-linear betas, rescaled to zero terminal SNR.
struct ScheduleConfig {
    std::int64_t timesteps = 1000;
    double beta_start = 0.00085;
    double beta_end = 0.012;
    bool zero_terminal_snr = true;
};

struct TextConfig {
    std::int64_t context_length = 77;
    std::int64_t pad_id = 0;
    bool clean = true;
};

struct AutoencoderConfig {
    std::string kind = "AutoencoderKL";
    std::int64_t factor = 8;
    std::vector<double> shift = {0.0};
    std::vector<double> scale = {0.18215};
};

// What a request that does not say otherwise gets. Two numbers: spatial stage, temporal stage.
struct Defaults {
    std::int64_t frames = 32;
    std::int64_t width = 448;
    std::int64_t height = 256;
    std::int64_t fps = 8;
    std::array<std::int64_t, 2> steps = {50, 50};
    std::array<double, 2> guidance = {12.0, 12.0};
    std::string solver = "ddim";
    std::optional<double> motion = 500.0;
    std::optional<double> appearance = 1.0;
    double offset_noise = 0.1;
};

struct ModelConfig {
    std::string name = "higen";
    std::string licence = "Apache-2.0";
    UNetConfig unet;
    ScheduleConfig schedule;
    TextConfig text;
    AutoencoderConfig autoencoder;
    Defaults defaults;
    std::int64_t max_frames = 256;
    bool optional_cues = false;
    std::vector<std::string> prompts;

    // Width and height of a video are multiples of this.
    [[nodiscard]] std::int64_t size_multiple() const { return autoencoder.factor * unet.size_multiple(); }
};

}  // namespace higen::core

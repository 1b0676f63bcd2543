// The model directory: manifest, files, hashes (higen/bundle.py).
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.h"

namespace higen::core {

// What a stage's graph computes in. File names do not mention fp32. From int8 on, most products are computed in 8 or 4
// bits, or by weights that memory holds in 8 bits (w8); the part after the dot (without one, fp32) is the precision of
// the stored weights.
constexpr std::array<std::string_view, 8> precisions = {"fp32",      "fp16",     "bf16",       "int8",
                                                        "int8.fp16", "fp8.fp16", "nvfp4.fp16", "w8"};
// The precision that only TensorRT computes in.
constexpr std::string_view engines_only = "nvfp4.fp16";

// Throws a request error for an unknown precision.
void check_precision(std::string_view precision);

// The precisions that can serve a request for one, the best first: some stages of a quantised model are not quantised.
[[nodiscard]] std::vector<std::string> stand_ins(std::string_view precision);

// The name of the file with a stage's graph in a precision.
[[nodiscard]] std::string graph_file(std::string_view stage, std::string_view precision = "fp32");

// The name of a weights file for a precision: unet.safetensors, int8.fp16 -> unet.fp16.safetensors.
[[nodiscard]] std::string weights_variant(std::string_view name, std::string_view precision);

// The content of a file. Throws an integrity error.
[[nodiscard]] std::string read_file(const std::filesystem::path& path);

// An opened model directory: the manifest was read and checked, and every listed file exists in its full size.
class Bundle {
public:
    // `verify`: check the sha256 of each file when it is first used. Throws a manifest or integrity error.
    Bundle(std::filesystem::path path, bool verify);

    [[nodiscard]] const std::filesystem::path& path() const { return path_; }
    [[nodiscard]] const Manifest& manifest() const { return manifest_; }
    // The sizes of the model's own symbols.
    [[nodiscard]] const Sizes& fixed() const { return manifest_.sizes.symbols; }
    [[nodiscard]] const auto& files() const { return manifest_.files; }
    [[nodiscard]] bool lists(std::string_view name) const { return manifest_.files.count(name) > 0; }

    // Name of the weights file that a stage's graph in a precision refers to. A precision has no separate file if the
    // model's weights are already stored in it.
    [[nodiscard]] std::string weights(const Stage& stage, std::string_view precision) const;

    // The error message for a quantised precision that the model was never quantised to, with the command that makes
    // it. "" for any other precision, and if a denoising stage has it: the other stages may then use a stand-in.
    [[nodiscard]] std::string not_quantized(std::string_view precision) const;

    // Path of a file of the model, after a check. Throws an integrity error, also for a file that was replaced after
    // the model was opened, so that a model is never a mixture of two.
    [[nodiscard]] std::filesystem::path file(const std::string& name) const;

private:
    // Tells a file from its replacement: device, inode, size, time of the last change.
    using Stamp = std::array<std::int64_t, 5>;

    [[nodiscard]] std::filesystem::path check_size(const std::string& name, const FileRecord& record) const;
    [[nodiscard]] static Stamp stamp_of(const std::filesystem::path& path);

    std::filesystem::path path_;
    bool verify_;
    Manifest manifest_;
    mutable std::mutex mutex_;
    mutable std::map<std::string, Stamp, std::less<>> known_;  // of files that passed their check
};

}  // namespace higen::core

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

// What a stage's graph computes in. fp32 is the unnamed one; from int8 on most products are computed in 8 or 4 bits,
// over the weights of the precision after the dot.
constexpr std::array<std::string_view, 7> precisions = {"fp32",      "fp16",     "bf16",      "int8",
                                                        "int8.fp16", "fp8.fp16", "nvfp4.fp16"};
// Of the precisions, what TensorRT alone computes in.
constexpr std::string_view engines_only = "nvfp4.fp16";

// Throws a request error for a precision that is none.
void check_precision(std::string_view precision);

// The precisions that serve a request for one, the best first: a quantised model has stages that are not.
[[nodiscard]] std::vector<std::string> stand_ins(std::string_view precision);

// The file that holds a stage's graph in a precision.
[[nodiscard]] std::string graph_file(std::string_view stage, std::string_view precision = "fp32");

// A weights file's name in the precision that its weights have there: unet.safetensors, int8.fp16 ->
// unet.fp16.safetensors.
[[nodiscard]] std::string weights_variant(std::string_view name, std::string_view precision);

// The content of a file. Throws an integrity error.
[[nodiscard]] std::string read_file(const std::filesystem::path& path);

// An opened model directory: the manifest was read and checked, and every file it lists is there in its full size.
class Bundle {
public:
    // `verify`: check the sha256 of each file when it is first used. Throws a manifest or integrity error.
    Bundle(std::filesystem::path path, bool verify);

    [[nodiscard]] const std::filesystem::path& path() const { return path_; }
    [[nodiscard]] const Manifest& manifest() const { return manifest_; }
    // The sizes that the model's own symbols have.
    [[nodiscard]] const Sizes& fixed() const { return manifest_.sizes.symbols; }
    [[nodiscard]] const auto& files() const { return manifest_.files; }
    [[nodiscard]] bool lists(std::string_view name) const { return manifest_.files.count(name) > 0; }

    // Name of the file that a stage's graph in a precision points into. A precision has no file of its own where the
    // model's weights are stored in it already.
    [[nodiscard]] std::string weights(const Stage& stage, std::string_view precision) const;

    // What is wrong with asking for a quantised precision that no stage was ever written in, and how to make it. "" for
    // any other precision, and where a denoising stage has it: the stages that have not then stand in.
    [[nodiscard]] std::string not_quantized(std::string_view precision) const;

    // Path of a file of the model, checked. Throws an integrity error, also for a file that was replaced after the model
    // was opened: a model is never a mixture of two.
    [[nodiscard]] std::filesystem::path file(const std::string& name) const;

private:
    // What tells a file from the one that has taken its place: device, inode, size, time of its last change.
    using Stamp = std::array<std::int64_t, 5>;

    [[nodiscard]] std::filesystem::path check_size(const std::string& name, const FileRecord& record) const;
    [[nodiscard]] static Stamp stamp_of(const std::filesystem::path& path);

    std::filesystem::path path_;
    bool verify_;
    Manifest manifest_;
    mutable std::mutex mutex_;
    mutable std::map<std::string, Stamp, std::less<>> known_;  // of the files that were found good
};

}  // namespace higen::core

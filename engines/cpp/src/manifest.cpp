#include <algorithm>
#include <initializer_list>

#include "bundle.h"
#include "errors.h"
#include "json_object.h"

namespace higen::core {
namespace {

void check(bool good, const std::string& message) {
    if (!good) fail_manifest(message);
}

void check_positive(const std::string& where, std::initializer_list<std::int64_t> numbers) {
    for (const auto number : numbers)
        check(number >= 1, where + " has the number " + std::to_string(number) + ": whole numbers from 1");
}

void read(const Json& json, const std::string& where, UNetConfig& unet) {
    Object object(json, where);
    object.value("in_channels", unet.in_channels);
    object.value("out_channels", unet.out_channels);
    object.value("base_channels", unet.base_channels);
    object.value("channel_multipliers", unet.channel_multipliers);
    object.value("blocks_per_level", unet.blocks_per_level);
    object.value("attention_levels", unet.attention_levels);
    object.value("head_dim", unet.head_dim);
    object.value("first_temporal_heads", unet.first_temporal_heads);
    object.value("text_dim", unet.text_dim);
    object.value("context_dim", unet.context_dim);
    object.value("context_tokens", unet.context_tokens);
    object.value("context_depth", unet.context_depth);
    object.value("context_heads", unet.context_heads);
    object.value("appearance_columns", unet.appearance_columns);
    object.value("dropout", unet.dropout);
    object.value("prior_preconditioning", unet.prior_preconditioning);
    object.value("pooled_context", unet.pooled_context);
    object.finish();

    check_positive(where, {unet.in_channels, unet.out_channels, unet.base_channels, unet.blocks_per_level,
                           unet.head_dim, unet.first_temporal_heads, unet.text_dim, unet.context_dim,
                           unet.context_tokens, unet.context_depth, unet.context_heads, unet.appearance_columns});
    for (const auto multiplier : unet.channel_multipliers) check_positive(where, {multiplier});
    // Far above any model; products of such numbers fit into 64 bits.
    constexpr std::int64_t most = 1 << 20;
    for (const auto number : {unet.in_channels, unet.base_channels, unet.head_dim, unet.text_dim, unet.context_dim,
                              unet.context_tokens, unet.context_heads, unet.appearance_columns})
        check(number <= most, where + " has the number " + std::to_string(number) + ": at most " +
                                  std::to_string(most));
    check(unet.channel_multipliers.size() <= 16 && !unet.channel_multipliers.empty(),
          where + ".channel_multipliers: 1 to 16 levels");
    check(unet.dropout >= 0 && unet.dropout < 1, where + ".dropout: from 0 to below 1");
    check(unet.embedding_dim() % unet.context_heads == 0, where + ".context_heads does not divide the channels");
    check(unet.attention_levels.size() == unet.channel_multipliers.size(),
          where + ".attention_levels: one entry per level");
    check(unet.base_channels % 32 == 0, where + ".base_channels: a multiple of 32");
    for (std::size_t i = 0; i < unet.channel_multipliers.size(); ++i) {
        check(unet.channel_multipliers[i] <= most, where + ".channel_multipliers: at most " + std::to_string(most));
        const auto width = unet.base_channels * unet.channel_multipliers[i];
        check(!unet.attention_levels[i] || width % unet.head_dim == 0,
              where + ".head_dim does not divide the channels of a level");
    }
}

void read(const Json& json, const std::string& where, ScheduleConfig& schedule) {
    Object object(json, where);
    object.value("timesteps", schedule.timesteps);
    object.value("beta_start", schedule.beta_start);
    object.value("beta_end", schedule.beta_end);
    object.value("zero_terminal_snr", schedule.zero_terminal_snr);
    object.finish();
    check(schedule.timesteps >= 2 && schedule.timesteps <= 1'000'000 && schedule.beta_start > 0 &&
              schedule.beta_end > schedule.beta_start && schedule.beta_end < 1,
          where + ": 2 to 1000000 timesteps and 0 < beta_start < beta_end < 1");
}

void free_form(const Json& json, const std::string& where) {
    if (!json.is_object()) fail_manifest(where + "=" + shown(json) + ": an object is wanted");
}

void read(const Json& json, const std::string& where, TextConfig& text) {
    Object object(json, where);
    object.key("clip", free_form);
    object.value("context_length", text.context_length);
    object.value("pad_id", text.pad_id);
    object.value("clean", text.clean);
    object.finish();
    check(text.context_length >= 3 && text.context_length <= 1 << 20 && text.pad_id >= 0,
          where + ": context_length from 3 (start, text and end) to 2^20, pad_id from 0");
}

void read(const Json& json, const std::string& where, AutoencoderConfig& autoencoder) {
    Object object(json, where);
    object.value("kind", autoencoder.kind);
    object.key("arguments", free_form);
    object.value("factor", autoencoder.factor);
    object.value("shift", autoencoder.shift);
    object.value("scale", autoencoder.scale);
    object.finish();
    const auto& scale = autoencoder.scale;
    check(autoencoder.factor >= 1 && autoencoder.factor <= 4096, where + ".factor: from 1 to 4096");
    check(!autoencoder.shift.empty() && !scale.empty() && std::find(scale.begin(), scale.end(), 0.0) == scale.end(),
          where + ": shift and scale are one number or one per channel, no scale 0");
}

void read(const Json& json, const std::string& where, Defaults& defaults) {
    Object object(json, where);
    object.value("frames", defaults.frames);
    object.value("width", defaults.width);
    object.value("height", defaults.height);
    object.value("fps", defaults.fps);
    object.value("steps", defaults.steps);
    object.value("guidance", defaults.guidance);
    object.value("solver", defaults.solver);
    object.value("motion", defaults.motion);
    object.value("appearance", defaults.appearance);
    object.value("offset_noise", defaults.offset_noise);
    object.finish();
}

void read(const Json& json, const std::string& where, ModelConfig& config) {
    Object object(json, where);
    const auto into = [](auto& part) {
        return [&part](const Json& value, const std::string& place) { read(value, place, part); };
    };
    object.value("name", config.name);
    object.value("licence", config.licence);
    object.key("unet", into(config.unet));
    object.key("schedule", into(config.schedule));
    object.key("text", into(config.text));
    object.key("autoencoder", into(config.autoencoder));
    object.key("defaults", into(config.defaults));
    object.value("max_frames", config.max_frames);
    object.value("optional_cues", config.optional_cues);
    object.value("prompts", config.prompts);
    object.finish();
}

// A file of a model lies in its directory or below: no absolute path, no way out.
void check_name(const std::string& name) {
    std::string path = name;
    std::replace(path.begin(), path.end(), '\\', '/');
    bool good = !path.empty() && name != "higen.json" && path.find(':') == std::string::npos &&
                path.find('\0') == std::string::npos;
    for (std::size_t start = 0; good && start <= path.size();) {
        const auto end = std::min(path.find('/', start), path.size());
        const auto part = path.substr(start, end - start);
        good = !part.empty() && part != "." && part != "..";
        start = end + 1;
    }
    check(good, "higen.json: files has the entry " + shown(name) + ": a path inside the model directory is wanted");
}

FileRecord read_record(const Json& json, const std::string& where) {
    FileRecord record;
    bool has_size = false, has_hash = false;
    Object object(json, where);
    object.key("size", [&](const Json& value, const std::string& place) {
        has_size = true;
        // A negative size is no error of the manifest's types, it is one that no file has.
        std::int64_t size = 0;
        Object::take(value, place, size);
        if (size < 0) fail_integrity(place + "=" + std::to_string(size) + ": no file has this size");
        record.size = static_cast<std::uintmax_t>(size);
    });
    object.key("sha256", [&](const Json& value, const std::string& place) {
        has_hash = true;
        Object::take(value, place, record.sha256);
    });
    object.finish();
    check(has_size && has_hash, where + ": needs size and sha256");
    return record;
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& where) {
    Json json;
    try {
        json = Json::parse(text.begin(), text.end());
    } catch (const Json::exception& error) {
        fail_manifest(where + ": not valid JSON: " + error.what());
    }
    const auto format = json.is_object() ? json.find("format") : json.end();
    if (format == json.end() || *format != "higen")
        fail_manifest(where + ": not a higen manifest (\"format\" is not \"higen\")");
    const auto version = json.find("version");
    check(version != json.end() && version->is_number_integer() && *version >= 1,
          where + ": version: a whole number from 1 to 1");
    check(*version == 1, where + ": version=" + shown(*version) + ", but this higen reads up to 1: a newer is needed");

    Manifest manifest;
    Object object(json, where);
    bool has_model = false, has_files = false;
    object.key("format", [](const Json&, const std::string&) {});
    object.key("version", [](const Json&, const std::string&) {});
    object.key("model", [&](const Json& value, const std::string&) {
        has_model = true;
        read(value, "model", manifest.config);
    });
    object.key("files", [&](const Json& value, const std::string&) {
        has_files = true;
        free_form(value, "files");
        for (const auto& item : value.items()) {
            check_name(item.key());
            manifest.files.emplace(item.key(), read_record(item.value(), "files." + item.key()));
        }
    });
    check(has_model && has_files, where + ": model and files are wanted");
    return manifest;
}

}  // namespace higen::core

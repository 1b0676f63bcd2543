#include "options.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <stdexcept>

const char* const usage = R"(Usage: higen-run MODEL "PROMPT" -o OUT [OPTION]...

Make a video from a text with a HiGen model directory.

  -o, --output FILE      .y4m (plays anywhere, BT.601), .npy (uint8 [F,H,W,3]), .rgb (the bytes of these frames alone),
                         or - for y4m on the standard output:  higen-run ... -o - | ffmpeg -i - out.mp4
  --seed N               0 to 2^64 - 1 (0)
  --steps N[,M]          of the spatial and the temporal stage
  --guidance X[,Y]       likewise
  --solver NAME          ddim or dpm++2m
  --frames N             1: the key frame alone
  --width N --height N --fps N
  --negative TEXT        what to steer away from
  --motion CUE           a number, one for each pair of frames or each frame (1,2,3), or none
  --appearance CUE       a number, one for each frame, or none
  --offset-noise X
  --image FILE           a picture instead of the drawn key frame: binary PPM (P6) of the video's size
  --tokens N,N,...       token ids from start to end, instead of the prompt's
  --backend NAME         auto, tensorrt (the model's engines) or onnx (its graphs)
  --precision NAME       fp32, fp16, bf16, int8, int8.fp16, fp8.fp16 or nvfp4.fp16: which of the model's engines or graphs
  --provider NAME        of ONNX Runtime: auto, cpu, cuda, tensorrt-rtx, or a plugin's provider with --provider-library FILE
  --threads N            of one stage on a CPU
  --no-verify            do not check the files' sha256
  --info                 what the model is and knows, what runs its stages; then end
  -q, --quiet            no progress, no warnings
  -h, --help             this text

What is not given is the model's default. The same model, seed and options give the frames of the Python package.
)";

namespace {

template <typename T>
T parse_number(const std::string& option, const std::string& text) {
    T value{};
    const auto* end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || rest != end)
        throw std::invalid_argument(option + "=" + text + ": a number is wanted" +
                                    (std::is_integral_v<T> ? ", whole and in range" : ""));
    return value;
}

template <typename T>
std::vector<T> parse_list(const std::string& option, const std::string& text) {
    std::vector<T> values;
    for (std::size_t start = 0; start <= text.size();) {
        const auto comma = std::min(text.find(',', start), text.size());
        values.push_back(parse_number<T>(option, text.substr(start, comma - start)));
        start = comma + 1;
    }
    return values;
}

template <typename T>
std::vector<T> parse_pair(const std::string& option, const std::string& text) {
    auto values = parse_list<T>(option, text);
    if (values.size() > 2)
        throw std::invalid_argument(option + "=" + text + ": one number, or two (spatial stage, temporal stage)");
    return values;
}

}  // namespace

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    using Take = std::function<void(const std::string&, const std::string&)>;
    const auto text = [](std::string& to) -> Take { return [&to](const auto&, const auto& value) { to = value; }; };
    const auto whole = [](std::optional<std::int64_t>& to) -> Take {
        return [&to](const auto& name, const auto& value) { to = parse_number<std::int64_t>(name, value); };
    };
    const auto cue = [](CueOption& to) -> Take {
        return [&to](const auto& name, const auto& value) {
            to = value == "none" ? std::vector<double>() : parse_list<double>(name, value);
        };
    };
    const std::map<std::string, Take> with_value = {
        {"--output", text(options.output)},
        {"--negative", text(options.negative_prompt)},
        {"--image", text(options.image)},
        {"--backend", text(options.backend)},
        {"--precision", text(options.precision)},
        {"--provider", text(options.provider)},
        {"--provider-library", text(options.provider_library)},
        {"--solver", [&](const auto&, const auto& value) { options.solver = value; }},
        {"--seed", [&](const auto& name, const auto& value) { options.seed = parse_number<std::uint64_t>(name, value); }},
        {"--steps", [&](const auto& name, const auto& value) { options.steps = parse_pair<std::int64_t>(name, value); }},
        {"--guidance", [&](const auto& name, const auto& value) { options.guidance = parse_pair<double>(name, value); }},
        {"--tokens", [&](const auto& name, const auto& value) { options.tokens = parse_list<std::int64_t>(name, value); }},
        {"--threads", [&](const auto& name, const auto& value) { options.threads = parse_number<std::int64_t>(name, value); }},
        {"--offset-noise", [&](const auto& name, const auto& value) { options.offset_noise = parse_number<double>(name, value); }},
        {"--frames", whole(options.frames)},
        {"--width", whole(options.width)},
        {"--height", whole(options.height)},
        {"--fps", whole(options.fps)},
        {"--motion", cue(options.motion)},
        {"--appearance", cue(options.appearance)},
    };
    const std::map<std::string, std::function<void()>> flags = {
        {"--no-verify", [&] { options.verify = false; }},
        {"--quiet", [&] { options.quiet = true; }},
        {"--info", [&] { options.info = true; }},
        {"--help", [&] { options.help = true; }},
    };
    const std::map<std::string, std::string> short_names = {{"-o", "--output"}, {"-q", "--quiet"}, {"-h", "--help"}};

    std::vector<std::string> positional;
    bool only_positional = false;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        auto argument = arguments[i];
        if (only_positional || argument.size() < 2 || argument[0] != '-') {
            positional.push_back(argument);
            continue;
        }
        if (argument == "--") {
            only_positional = true;
            continue;
        }
        std::optional<std::string> value;
        if (const auto equals = argument.find('='); equals != std::string::npos && argument.compare(0, 2, "--") == 0) {
            value = argument.substr(equals + 1);
            argument.resize(equals);
        }
        if (const auto found = short_names.find(argument); found != short_names.end()) argument = found->second;
        if (const auto flag = flags.find(argument); flag != flags.end() && !value) {
            flag->second();
        } else if (const auto option = with_value.find(argument); option != with_value.end()) {
            if (!value) {
                if (i + 1 == arguments.size()) throw std::invalid_argument(argument + ": a value is wanted");
                value = arguments[++i];
            }
            option->second(argument, *value);
        } else {
            throw std::invalid_argument(arguments[i] + ": unknown option; higen-run --help lists them");
        }
    }
    if (options.help) return options;
    const std::size_t wanted = options.info || options.tokens ? 1 : 2;
    if (positional.size() < wanted || positional.size() > 2)
        throw std::invalid_argument("a model and a prompt are wanted; higen-run --help says more");
    options.model = positional[0];
    if (positional.size() == 2) options.prompt = positional[1];
    if (!options.info && options.output.empty()) throw std::invalid_argument("--output: a file is wanted");
    return options;
}

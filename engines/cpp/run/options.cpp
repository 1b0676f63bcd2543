#include "options.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>
#include <stdexcept>

const char* const usage = R"(Usage: higen-run MODEL "PROMPT" -o OUT [OPTION]...

Make a video from a text with a model directory.

  -o, --output FILE      .mp4 (H.264) or .webm (VP9), which need the program ffmpeg; .y4m (plays anywhere, BT.601), .npy
                         (uint8 [F,H,W,3]), .rgb (the bytes of these frames alone); - is y4m on the standard output
  --seed N               0 to 2^64 - 1 (0)
  --steps N[,M...]       denoising steps: one number, or one for each loop; --info lists the loops
  --guidance X[,Y...]    guidance scale: one number, or one for each loop; X:Y:... is one number per frame
  --solver NAME[,NAME...]  solver: one name, or one for each loop
  --guidance-interval A,B[,...]  part of the steps with guidance, in 0 to 1: two numbers, or two for each loop
  --windows N[,S]        make a longer clip in windows of N frames, S apart; 0: all frames at once
  --window-noise WORD    initial noise of a clip in windows: fresh, shuffled or repeated
  --free-init N[,S,T[,O]]  FreeInit: iterations, stop frequencies in space and time, order of the filter
  --free-init-filter WORD  filter of FreeInit: butterworth, gaussian or ideal
  --reuse N[,M...]       run the whole network only every N steps; other steps reuse its deep features
  --preset NAME          a preset of the model: it sets the steps and guidance that are not given. Without it, a request
                         with only a prompt, seed, frames, size and rate has the model's usual preset
  --inversion TEXT       invert the picture or clip to begin from with this text, which describes it; else noise is added
  --frames N
  --width N --height N --fps N
  --negative TEXT        what the video should not show
  --control NAME=VALUE[,VALUE...]   a control of the model: a number, one per frame, a text, or "unspecified"
  --matrix NAME=FILE     a control's numbers, a row for each frame: .npy, or text with a row on each line
  --picture NAME=FILE[,FILE...]     a picture or the frames of a clip: PNG, JPEG or binary PPM (P6) files
  --image FILE           the same as --picture image=FILE
  --keyframe INDEX=FILE  a known frame; INDEX from 0, or -1 for the last frame; repeatable
  --list-controls        print what --control and --picture take for this model, and exit
  --tokens N,N,...       token ids from start to end, instead of the prompt's
  --backend NAME         auto, tensorrt (the model's engines) or onnx (its graphs)
  --precision NAME       of the engines or graphs: fp32, fp16, bf16, int8, int8.fp16, fp8.fp16, nvfp4.fp16 or w8
  --provider NAME        ONNX Runtime's provider: auto, cpu, cuda, cuda:N (a GPU, from 0), tensorrt-rtx, openvino,
                         webgpu, or another plugin's provider
  --provider-library FILE   the library of a plugin
  --threads N            CPU threads of one stage
  --no-verify            do not check the files' sha256
  --info                 print what the model is and takes, and what runs its stages; then exit
  -q, --quiet            no progress, no warnings
  -h, --help             this text

Options that are not given have the model's defaults. The same model, seed and options give the same frames as the
Python package.
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

// The parts of a text between separators.
std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    for (std::size_t start = 0; start <= text.size();) {
        const auto end = std::min(text.find(separator, start), text.size());
        parts.push_back(text.substr(start, end - start));
        start = end + 1;
    }
    return parts;
}

template <typename T>
std::vector<T> parse_list(const std::string& option, const std::string& text, char separator = ',') {
    std::vector<T> values;
    for (const auto& part : split(text, separator)) values.push_back(parse_number<T>(option, part));
    return values;
}

// "NAME=VALUE"
std::pair<std::string, std::string> parse_named(const std::string& option, const std::string& text) {
    const auto equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
        throw std::invalid_argument(option + "=" + text + ": NAME=VALUE is wanted");
    return {text.substr(0, equals), text.substr(equals + 1)};
}

using Take = std::function<void(const std::string&, const std::string&)>;

Take to_text(std::string& to) {
    return [&to](const auto&, const auto& value) { to = value; };
}

template <typename T>
Take to_number(T& to) {
    return [&to](const auto& name, const auto& value) { to = parse_number<T>(name, value); };
}

Take to_whole(std::optional<std::int64_t>& to) {
    return [&to](const auto& name, const auto& value) { to = parse_number<std::int64_t>(name, value); };
}

std::map<std::string, Take> options_with_values(Options& options) {
    return {
        {"--output", to_text(options.output)},
        {"--negative", to_text(options.negative_prompt)},
        {"--backend", to_text(options.backend)},
        {"--precision", [&](const auto&, const auto& value) { options.precision = value; }},
        {"--provider", to_text(options.provider)},
        {"--provider-library", to_text(options.provider_library)},
        {"--seed", to_number(options.seed)},
        {"--threads", to_number(options.threads)},
        {"--frames", to_whole(options.frames)},
        {"--width", to_whole(options.width)},
        {"--height", to_whole(options.height)},
        {"--fps", to_whole(options.fps)},
        {"--solver", [&](const auto&, const auto& value) { options.solvers = split(value, ','); }},
        {"--steps",
         [&](const auto& name, const auto& value) { options.steps = parse_list<std::int64_t>(name, value); }},
        {"--tokens",
         [&](const auto& name, const auto& value) { options.tokens = parse_list<std::int64_t>(name, value); }},
        {"--guidance",
         [&](const auto& name, const auto& value) {
             options.guidance.clear();
             for (const auto& part : split(value, ',')) options.guidance.push_back(parse_list<double>(name, part, ':'));
         }},
        {"--window-noise", to_text(options.window_noise)},
        {"--preset", to_text(options.preset)},
        {"--inversion", [&](const auto&, const auto& value) { options.inversion = value; }},
        {"--free-init-filter", to_text(options.free_init_filter)},
        {"--guidance-interval",
         [&](const auto& name, const auto& value) { options.guidance_interval = parse_list<double>(name, value); }},
        {"--free-init",
         [&](const auto& name, const auto& value) { options.free_init = parse_list<double>(name, value); }},
        {"--windows",
         [&](const auto& name, const auto& value) { options.windows = parse_list<std::int64_t>(name, value); }},
        {"--reuse",
         [&](const auto& name, const auto& value) { options.reuse = parse_list<std::int64_t>(name, value); }},
        {"--control",
         [&](const auto& name, const auto& value) { options.controls.push_back(parse_named(name, value)); }},
        {"--picture",
         [&](const auto& name, const auto& value) {
             const auto [control, files] = parse_named(name, value);
             options.pictures.emplace_back(control, split(files, ','));
         }},
        {"--matrix",
         [&](const auto& name, const auto& value) { options.matrices.push_back(parse_named(name, value)); }},
        {"--keyframe",
         [&](const auto& name, const auto& value) { options.keyframes.push_back(parse_named(name, value)); }},
        {"--image",
         [&](const auto&, const auto& value) {
             options.pictures.emplace_back("image", std::vector<std::string>{value});
         }},
    };
}

std::map<std::string, bool*> options_without(Options& options) {
    return {{"--quiet", &options.quiet},
            {"--info", &options.info},
            {"--list-controls", &options.list_controls},
            {"--help", &options.help}};
}

// Takes an option and its value; the value may be the next argument.
void take_option(Options& options, const std::vector<std::string>& arguments, std::size_t& i) {
    static const std::map<std::string, std::string> short_names = {
        {"-o", "--output"}, {"-q", "--quiet"}, {"-h", "--help"}};
    auto argument = arguments[i];
    std::optional<std::string> value;
    if (const auto equals = argument.find('='); equals != std::string::npos && argument.compare(0, 2, "--") == 0) {
        value = argument.substr(equals + 1);
        argument.resize(equals);
    }
    if (const auto found = short_names.find(argument); found != short_names.end()) argument = found->second;
    if (argument == "--no-verify" && !value) {
        options.verify = false;
        return;
    }
    const auto flags = options_without(options);
    if (const auto flag = flags.find(argument); flag != flags.end() && !value) {
        *flag->second = true;
        return;
    }
    const auto known = options_with_values(options);
    const auto option = known.find(argument);
    if (option == known.end())
        throw std::invalid_argument(arguments[i] + ": unknown option; higen-run --help lists them");
    if (!value && i + 1 == arguments.size()) throw std::invalid_argument(argument + ": a value is wanted");
    option->second(argument, value ? *value : arguments[++i]);
}

}  // namespace

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    std::vector<std::string> positional;
    bool only_positional = false;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const auto& argument = arguments[i];
        if (only_positional || argument.size() < 2 || argument[0] != '-')
            positional.push_back(argument);
        else if (argument == "--")
            only_positional = true;
        else
            take_option(options, arguments, i);
    }
    if (options.help) return options;
    const bool only_tells = options.info || options.list_controls;
    if (positional.empty() || positional.size() > 2)  // a model that reads no text takes no prompt
        throw std::invalid_argument("a model and a prompt are wanted; higen-run --help says more");
    options.model = positional[0];
    if (positional.size() == 2) options.prompt = positional[1];
    if (!only_tells && options.output.empty()) throw std::invalid_argument("--output: a file is wanted");
    return options;
}

std::vector<double> parse_numbers(const std::string& option, const std::string& text) {
    return parse_list<double>(option, text);
}

/* higen: text-to-video models, as a C library.
 *
 * A model directory (higen.json, its graphs and weights) is opened once; `higen_generate` turns a text into frames and
 * hands them to a callback. With the same directory and seed, frames differ from the Python package's by at most 1/255.
 *
 *     higen_model* model = NULL;
 *     if (higen_model_open("path/to/model", NULL, &model) != HIGEN_OK) { puts(higen_last_error()); exit(1); }
 *     higen_request request;
 *     higen_request_init(model, &request);          // the model's defaults
 *     request.prompt = "a whale flapping its tail on a blue sky";
 *     request.seed = 7;
 *     higen_callbacks callbacks = HIGEN_CALLBACKS_INIT;
 *     callbacks.on_frames = save_them;
 *     higen_status status = higen_generate(model, &request, &callbacks);
 *     higen_model_close(model);
 *
 * All texts are UTF-8. No function throws or ends the process. A function that fails returns a status and leaves a
 * message for the calling thread in `higen_last_error`. Several threads may use a model at once, also for several
 * `higen_generate` calls. `higen_model_close` may be called at any time, from any thread: it first stops what runs on
 * the model. A closed or freed handle is refused with HIGEN_ERROR_CLOSED; handles are never reused.
 *
 * Structures begin with their size, so that a later version can add fields: initialise each with its function or macro.
 * Before 1.0 a new minor version may change any of this; the loader treats it as another library (libhigen.so.0.2).
 */
#ifndef HIGEN_HIGEN_H
#define HIGEN_HIGEN_H

#include <stddef.h>
#include <stdint.h>

#if defined(HIGEN_STATIC)
#define HIGEN_API
#elif defined(_WIN32)
#if defined(HIGEN_BUILDING)
#define HIGEN_API __declspec(dllexport)
#else
#define HIGEN_API __declspec(dllimport)
#endif
#else
#define HIGEN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum higen_status {
    HIGEN_OK = 0,
    HIGEN_ERROR_REQUEST = 1,     /* an argument is wrong; the message names it, its value and what is allowed */
    HIGEN_ERROR_CLEANING = 2,    /* only the Python package can clean this text: use plain text or `tokens` */
    HIGEN_ERROR_MANIFEST = 3,    /* higen.json is missing, malformed or of another version */
    HIGEN_ERROR_INTEGRITY = 4,   /* a file is missing, truncated, altered or wrong for a stage; or tables were edited */
    HIGEN_ERROR_UNAVAILABLE = 5, /* the requested provider cannot run here, or the model has no graph for a stage */
    HIGEN_ERROR_BACKEND = 6,     /* the backend failed at run time */
    HIGEN_ERROR_MEMORY = 7,      /* out of memory */
    HIGEN_ERROR_INTERNAL = 8,    /* an error of this library */
    HIGEN_CANCELLED = 9,         /* a callback, a token, `higen_cancel` or `higen_model_close` stopped the work */
    HIGEN_ERROR_CLOSED = 10      /* the model was closed, or the token freed, before this call */
} higen_status;

/* The version of this library, for example "0.2.0". */
HIGEN_API const char* higen_version(void);

/* The name of a status, for example "HIGEN_ERROR_REQUEST". */
HIGEN_API const char* higen_status_name(higen_status status);

/* Why the last function of this thread failed; "" if none has. Valid until the thread's next call. */
HIGEN_API const char* higen_last_error(void);

/* ---- Models ---- */

typedef struct higen_model higen_model;

typedef struct higen_model_options {
    size_t struct_size;
    const char* provider;         /* of ONNX Runtime: NULL or "auto", "cpu", "cuda", "tensorrt-rtx", "openvino",
                                     "webgpu", or ONNX Runtime's name for another plugin's provider; ":N" chooses
                                     another GPU than the first ("cuda:1") */
    const char* provider_library; /* path of a plugin execution provider; NULL: for "openvino" and "webgpu" the path in
                                     the environment variable HIGEN_OPENVINO_LIBRARY or HIGEN_WEBGPU_LIBRARY */
    int32_t threads;              /* per stage on a CPU; 0: ONNX Runtime's choice */
    int32_t skip_verification;    /* 1: trust the files, do not compute their sha256 */
    const char* backend;          /* NULL or "auto": engines if they fit, else graphs; "tensorrt"; "onnx" */
    const char* precision;        /* "fp32", "fp16", "bf16", "int8", "int8.fp16", "fp8.fp16", "nvfp4.fp16", "w8";
                                     NULL: the best here */
} higen_model_options;

#define HIGEN_MODEL_OPTIONS_INIT {sizeof(higen_model_options), NULL, NULL, 0, 0, NULL, NULL}

/* Open a model directory: its manifest, its tokenizer and the graphs or engines of every stage that the default request
 * needs; other stages are loaded when a request first needs them. `options` may be NULL. On failure *model is NULL.
 *
 * A quantised precision ("int8", ...) has graphs for some stages only; the others run in the precision of its weights.
 * A precision that the model was never quantised to is HIGEN_ERROR_UNAVAILABLE; higen_last_error names the command.
 * NULL is fp32 on a CPU. On a GPU it is an engine of any precision, or fp16 if a stage has such a graph. */
HIGEN_API higen_status higen_model_open(const char* path, const higen_model_options* options, higen_model** model);

/* Close a model: stop its generations (HIGEN_CANCELLED), wait until every call on the model has returned, then free it.
 * May be called from any thread; NULL and a closed model are allowed. Inside a callback it does not wait: the model is
 * freed when its last call returns. */
HIGEN_API void higen_model_close(higen_model* model);

typedef struct higen_model_info {
    size_t struct_size;
    const char* name;        /* texts live as long as the model */
    const char* licence;
    const char* family;
    const char* report;      /* one line per stage: what runs it, and why no better backend does */
    int32_t size_multiple;   /* width and height are multiples of this */
    int32_t min_frames;
    int32_t max_frames;
    int32_t context_length;  /* token ids of a text with start and end; 0: the model reads no text */
    int32_t pad_id;
    size_t loop_count;       /* denoising loops: higen_model_loop */
    size_t control_count;    /* what a request may set besides the fields of higen_request: higen_model_control */
    size_t prompt_count;     /* prompts that work well with the model: higen_model_prompt */
    size_t preset_count;     /* presets: higen_model_preset */
} higen_model_info;

#define HIGEN_MODEL_INFO_INIT {sizeof(higen_model_info), NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0}

HIGEN_API higen_status higen_model_describe(const higen_model* model, higen_model_info* info);

/* A denoising loop. Loops run in this order, and the last one that runs gives the result. */
typedef struct higen_loop_info {
    size_t struct_size;
    const char* name;
    int32_t every_frame;             /* 1: it denoises all frames of the request; 0: one frame */
    int32_t least_frames;            /* with fewer frames it is left out; so is a loop that the result does not need */
    int32_t steps;                   /* the default */
    int32_t max_steps;
    const double* guidance;          /* the default: guidance_count numbers, spread over the frames */
    size_t guidance_count;
    int32_t guided;                  /* 0: it has no guidance and allows only 1 */
    const char* const* solvers;      /* solver_count names, the default first */
    size_t solver_count;
} higen_loop_info;

#define HIGEN_LOOP_INFO_INIT {sizeof(higen_loop_info), NULL, 0, 0, 0, 0, NULL, 0, 0, NULL, 0}

/* The loop at `index` of info.loop_count. */
HIGEN_API higen_status higen_model_loop(const higen_model* model, size_t index, higen_loop_info* info);

/* A preset: steps and guidance for a request that names it and leaves them out. */
typedef struct higen_preset_info {
    size_t struct_size;
    const char* name;
    int32_t usual;           /* 1: for requests that set only prompt, seed, frames, width, height and fps */
    const int32_t* steps;    /* info.loop_count numbers; 0: the loop's default */
    const double* guidance;  /* info.loop_count numbers; negative: the loop's default */
} higen_preset_info;

#define HIGEN_PRESET_INFO_INIT {sizeof(higen_preset_info), NULL, 0, NULL, NULL}

/* The preset at `index` of info.preset_count. */
HIGEN_API higen_status higen_model_preset(const higen_model* model, size_t index, higen_preset_info* info);

typedef enum higen_control_kind {
    HIGEN_CONTROL_NUMBER = 0,
    HIGEN_CONTROL_WHOLE = 1,   /* a whole number */
    HIGEN_CONTROL_CURVE = 2,   /* one number, one per frame, or one per pair of frames (not for similarity) */
    HIGEN_CONTROL_TEXT = 3,
    HIGEN_CONTROL_PICTURE = 4, /* higen_picture of one frame */
    HIGEN_CONTROL_CLIP = 5,    /* higen_picture of as many frames as the request has */
    HIGEN_CONTROL_CHOICE = 6,  /* one of the texts in `choices` */
    HIGEN_CONTROL_FRAMES = 7,  /* pictures of single frames: a higen_picture each, named NAME[INDEX]; or a clip, NAME */
    HIGEN_CONTROL_MASK = 8,    /* higen_picture of one frame, or as many as the request has; white is redrawn */
    HIGEN_CONTROL_MAP = 9      /* higen_picture of one frame for all, or at least as many as the request has */
} higen_control_kind;

/* What a request may set for this model. */
typedef struct higen_control_info {
    size_t struct_size;
    const char* name;
    higen_control_kind kind;
    const char* encoding;         /* "number", "curve", "sinusoid", "similarity" (also takes a matrix), or NULL */
    int32_t has_low;              /* 1: `low` is the smallest value */
    double low;
    int32_t has_high;
    double high;
    int32_t has_default;          /* 0: unspecified, or no picture */
    double default_value;         /* of a number, whole or curve */
    const char* default_text;     /* of a text or choice, else NULL */
    int32_t optional;             /* 1: it may be left unspecified */
    const char* const* choices;   /* choice_count texts */
    size_t choice_count;
    const char* meaning;          /* one line for people to read */
} higen_control_info;

#define HIGEN_CONTROL_INFO_INIT \
    {sizeof(higen_control_info), NULL, HIGEN_CONTROL_NUMBER, NULL, 0, 0.0, 0, 0.0, 0, 0.0, NULL, 0, NULL, 0, NULL}

/* The number of controls of a model; 0 for NULL. */
HIGEN_API size_t higen_controls(const higen_model* model);

/* The control at `index` of higen_controls(model). */
HIGEN_API higen_status higen_model_control(const higen_model* model, size_t index, higen_control_info* info);

/* The prompt at `index` of info.prompt_count; NULL past the end. */
HIGEN_API const char* higen_model_prompt(const higen_model* model, size_t index);

/* Token ids of a text as the text encoder takes them: start, text, end, padding. `ids` has room for `count` ids, which
 * must be the model's context_length. A text that is too long is cut without a warning. Brackets and BREAK are plain
 * text here: only higen_request.prompt has words with weights and several chunks. */
HIGEN_API higen_status higen_tokenize(const higen_model* model, const char* text, int64_t* ids, size_t count);

/* ---- Requests ---- */

/* A value of a control without pixels. A control that a request does not list has its default. */
typedef struct higen_control {
    const char* name;
    const double* values; /* rows x columns numbers, row by row; 1 x 1 is one number, n x 1 a list */
    size_t rows;
    size_t columns;
    const char* text;     /* of a text or choice. values and text NULL: unspecified, if the control is optional */
} higen_control;

/* Pixels of a control. They are scaled to cover the request's size, then cropped to it. A control of kind frames has
 * one higen_picture for each frame that is given; its name has the index: "keyframes[0]" is the first frame,
 * "keyframes[-1]" the last. A clip of at least two frames without an index gives frame 0, 1, 2, ... */
typedef struct higen_picture {
    const char* name;
    const uint8_t* rgb; /* frames x height x width x 3 bytes */
    int32_t frames;     /* picture: 1; clip: the request's; mask: either; map: 1, or at least the request's */
    int32_t height;
    int32_t width;
} higen_picture;

/* A picture from a file. */
typedef struct higen_image {
    size_t struct_size;
    uint8_t* rgb; /* height x width x 3 bytes */
    int32_t height;
    int32_t width;
} higen_image;

#define HIGEN_IMAGE_INIT {sizeof(higen_image), NULL, 0, 0}

/* Read a PNG, JPEG or binary PPM (P6) file for a higen_picture. It is turned as its Exif record says, laid over white
 * if transparent, and converted to 8 bits. HIGEN_ERROR_UNAVAILABLE: this library was built without libpng or libjpeg.
 * Free it with higen_image_free. */
HIGEN_API higen_status higen_image_open(const char* path, higen_image* image);

HIGEN_API void higen_image_free(higen_image* image);

/* One number for all frames of a loop, or one per frame. */
typedef struct higen_curve {
    const double* values; /* NULL: the loop's default */
    size_t count;
} higen_curve;

typedef struct higen_request {
    size_t struct_size;
    const char* prompt;              /* ignored by a model that reads no text */
    const char* negative_prompt;     /* NULL: "" */
    const int64_t* tokens;           /* instead of `prompt`: token_count ids from start to end; padding is added */
    size_t token_count;
    const int64_t* negative_tokens;  /* instead of `negative_prompt` */
    size_t negative_token_count;
    uint64_t seed;
    const int32_t* steps;            /* step_count numbers: one for every loop, or one per loop in the order of
                                        higen_model_loop; 0: that loop's default. NULL: the defaults */
    size_t step_count;
    const higen_curve* guidance;     /* guidance_count curves: one for all loops, or one per loop. NULL: the defaults */
    size_t guidance_count;
    const char* const* solvers;      /* solver_count names: one for every loop, or one per loop; a NULL name: that
                                        loop's default. NULL: the defaults */
    size_t solver_count;
    int32_t frames;
    int32_t width;
    int32_t height;
    int32_t fps;
    const higen_control* controls;   /* control_count values, each control at most once */
    size_t control_count;
    const higen_picture* pictures;   /* picture_count pictures and clips, each control at most once */
    size_t picture_count;
    const double* guidance_interval; /* start and end of the rows with guidance, as fractions from 0 to 1; in other
                                        rows it is 1. Two numbers for every loop, or two per loop. NULL: 0, 1 */
    size_t guidance_interval_count;
    const int32_t* windows;          /* windows of a longer clip: length in frames and stride, or only the length
                                        (stride: half of it); 0: the whole clip at once. NULL: the model's */
    size_t window_count;
    const char* window_noise;        /* initial noise for windows: "fresh", "shuffled", "repeated". NULL: the model's */
    const double* free_init;         /* FreeInit: iterations, then optionally the stop frequencies in space and time
                                        (0.25, 0.25) and the filter's order (4). NULL: no FreeInit */
    size_t free_init_count;
    const char* free_init_filter;    /* "butterworth", "gaussian", "ideal". NULL: "butterworth" */
    const int32_t* reuse;            /* n: the whole network runs in every n-th row of a loop, and the other rows reuse
                                        its deep features. One number for every loop, or one per loop. NULL: 1 */
    size_t reuse_count;
    const char* preset;              /* a preset of the model: steps and guidance where they are NULL, and the stretch
                                        of the loops. NULL: the model's usual one if the request sets only prompt,
                                        seed, frames, width, height and fps; else none */
    const char* inversion;           /* a text that describes the picture or clip from which a loop begins: its latents
                                        are inverted into noise, and no noise is added. "": the empty text. NULL: noise
                                        is added */
} higen_request;

/* Fill a request with the model's defaults. The caller sets the prompt. */
HIGEN_API higen_status higen_request_init(const higen_model* model, higen_request* request);

/* ---- Generation ---- */

typedef struct higen_step {
    size_t struct_size;
    const char* loop;  /* its name */
    const char* stage; /* the stage that did the step */
    int32_t index;     /* from 0 */
    int32_t total;     /* rows of the solver's table that run; a solver may have several per step */
    double t;          /* timestep of the loop's schedule */
    int32_t frames;    /* of a preview: the loop's frames */
    int32_t width;
    int32_t height;
    const void* state; /* for higen_step_preview */
    int32_t videos;    /* in this batch: the requests of higen_generate_batch, else 1 */
} higen_step;

typedef struct higen_frames {
    size_t struct_size;
    const uint8_t* rgb; /* count x height x width x 3, valid during the callback */
    int32_t first;      /* index of the first of these frames, from 0 */
    int32_t count;
    int32_t total;
    int32_t width;
    int32_t height;
    int32_t fps;
    int32_t video;      /* index of its request, from 0 */
} higen_frames;

/* Stops the generations that it is given to; see higen_callbacks. */
typedef struct higen_token higen_token;

HIGEN_API higen_status higen_token_create(higen_token** token);

/* Stop the generations with this token, from any thread, also within a step. A generation that begins with it later
 * stops at once: a token stays cancelled. */
HIGEN_API higen_status higen_token_cancel(higen_token* token);

/* Free a token. A generation that uses it continues. NULL is allowed. */
HIGEN_API void higen_token_free(higen_token* token);

typedef struct higen_callbacks {
    size_t struct_size;
    void* user;                                              /* the first argument of each callback */
    int (*on_step)(void* user, const higen_step* step);      /* after each denoising step; not 0: stop the work */
    int (*on_frames)(void* user, const higen_frames* frames); /* the result, a few frames at a time; not 0: stop */
    void (*on_warning)(void* user, const char* message);     /* a prompt was cut or has unknown words, or a stage
                                                                runs on a worse backend */
    higen_token* token;                                      /* stops only generations with this token; NULL: none */
} higen_callbacks;

#define HIGEN_CALLBACKS_INIT {sizeof(higen_callbacks), NULL, NULL, NULL, NULL, NULL}

/* Make a video. The request is checked before any work starts. Callbacks run on the calling thread and must not throw.
 * Returns HIGEN_CANCELLED if a callback, its token, higen_cancel or higen_model_close stopped it. */
HIGEN_API higen_status higen_generate(higen_model* model, const higen_request* request,
                                      const higen_callbacks* callbacks);

/* Make a video of each of `count` requests at once. Their denoising steps run as one batch, which is faster on a GPU.
 * The requests must agree in frames, width, height, fps, steps, solvers, guidance_interval, windows, window_noise,
 * free_init and reuse, in a preset's stretch, in whether inversion is NULL, and in which pictures and clips are given;
 * everything else may differ. Each video is the same as without the other requests, except for the rounding of a larger
 * batch. on_frames gets one video after another. */
HIGEN_API higen_status higen_generate_batch(higen_model* model, const higen_request* const* requests, size_t count,
                                            const higen_callbacks* callbacks);

/* Inside on_step: decode the present estimate of the results and write step->videos x frames x height x width x 3 bytes
 * to `rgb`. */
HIGEN_API higen_status higen_step_preview(const higen_step* step, uint8_t* rgb, size_t size);

/* Stop every generation that runs on this model now, from any thread, also within a step. */
HIGEN_API higen_status higen_cancel(higen_model* model);

#ifdef __cplusplus
}
#endif

#endif

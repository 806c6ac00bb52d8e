// Not run: see README.md.

import Foundation

struct ChatError: Error {
    let message: String
}

/// A language model, from a folder that `to_genai` wrote.
final class Chat {
    private var model: OpaquePointer?
    private var tokenizer: OpaquePointer?
    private var adapters: OpaquePointer?

    init(folder: URL) throws {
        try check(OgaCreateModel(folder.path, &model))
        try check(OgaCreateTokenizer(model, &tokenizer))
        try check(OgaCreateAdapters(model, &adapters))
    }

    deinit {
        OgaDestroyAdapters(adapters)
        OgaDestroyTokenizer(tokenizer)
        OgaDestroyModel(model)
    }

    /// Makes an adapter of the folder known.
    func addAdapter(_ name: String, file: URL) throws {
        try check(OgaLoadAdapter(adapters, file.path, name))
    }

    /// Calls `onText` with each piece of the answer, until it says `false`.
    func answer(
        _ prompt: String, adapter: String? = nil, limit: Double = 512,
        onText: (String) -> Bool
    ) throws {
        var tokens, settings, generator, stream: OpaquePointer?
        defer {
            OgaDestroyTokenizerStream(stream)
            OgaDestroyGenerator(generator)
            OgaDestroyGeneratorParams(settings)
            OgaDestroySequences(tokens)
        }
        // The prompt has the form that the model's chat template gives it.
        try check(OgaCreateSequences(&tokens))
        try check(OgaTokenizerEncode(tokenizer, prompt, tokens))
        try check(OgaCreateGeneratorParams(model, &settings))
        try check(OgaGeneratorParamsSetSearchNumber(settings, "max_length", limit))
        try check(OgaCreateGenerator(model, settings, &generator))
        if let adapter {
            try check(OgaSetActiveAdapter(generator, adapters, adapter))
        }
        try check(OgaGenerator_AppendTokenSequences(generator, tokens))
        try check(OgaCreateTokenizerStream(tokenizer, &stream))
        while !OgaGenerator_IsDone(generator) {
            try check(OgaGenerator_GenerateNextToken(generator))
            let count = OgaGenerator_GetSequenceCount(generator, 0)
            let id = OgaGenerator_GetSequenceData(generator, 0)![count - 1]
            var text: UnsafePointer<CChar>?
            try check(OgaTokenizerStreamDecode(stream, id, &text))
            if let text, !onText(String(cString: text)) { return }
        }
    }
}

private func check(_ result: OpaquePointer?) throws {
    guard let result else { return }
    defer { OgaDestroyResult(result) }
    throw ChatError(message: String(cString: OgaResultGetError(result)))
}

// Not run: see README.md.

import Foundation
import OnnxRuntimeBindings

/// A classifier of texts, from a folder that `to_onnx` wrote.
final class Classifier {
    private let environment: ORTEnv
    private let session: ORTSession
    private let labels: [String]

    init(folder: URL) throws {
        environment = try ORTEnv(loggingLevel: .warning)
        session = try ORTSession(
            env: environment,
            modelPath: folder.appendingPathComponent("model.onnx").path,
            sessionOptions: nil)
        let file = folder.appendingPathComponent("labels.json")
        labels = try JSONDecoder().decode(
            [String].self, from: Data(contentsOf: file))
    }

    /// The label of a text, whose ids are framed as `preprocessor.json` says.
    func classify(ids: [Int32], paddingId: Int32 = 0) throws -> String {
        let values: [String: [Int32]] = [
            "token_ids": ids,
            "padding_mask": ids.map { $0 == paddingId ? 0 : 1 },
            "segment_ids": ids.map { _ in 0 },
        ]
        var inputs: [String: ORTValue] = [:]
        for name in try session.inputNames() {
            inputs[name] = try tensor(values[name] ?? ids)
        }
        let names = try session.outputNames()
        let outputs = try session.run(
            withInputs: inputs, outputNames: Set(names), runOptions: nil)
        let data = try outputs[names[0]]!.tensorData() as Data
        let logits = data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        return labels[logits.indices.max { logits[$0] < logits[$1] }!]
    }

    private func tensor(_ values: [Int32]) throws -> ORTValue {
        let data = values.withUnsafeBytes { NSMutableData(data: Data($0)) }
        return try ORTValue(
            tensorData: data,
            elementType: .int32,
            shape: [1, NSNumber(value: values.count)])
    }
}

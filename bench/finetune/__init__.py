"""Fine-tuning: pre-trained models on labelled or plain text, with settings of each optimizer from a sweep."""
